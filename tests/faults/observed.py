"""What came of each fault: the table of README.md beside this file.

make faults                       writes out/faults/*.json, one file per fault
python -m tests.faults.observed   prints them as the table
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest

SAID = 150
FOLDER = Path(__file__).parents[2] / "out" / "faults"


@dataclass(frozen=True)
class Observation:
    """A line of the table."""

    injected: str
    promised: str
    lost: int
    """Rows of the input that have no row in the output."""
    doubled: int
    redone: str
    """Rows that an engine was asked for more often than once, as it did not know what was lost."""
    recovered_s: float | None
    """From the fault's end to the next row that an engine was asked for."""
    exits: str
    """Exit codes of the runs, in turn."""
    said: str
    """To the user, first of all; its first 150 characters."""


class Observer:
    """Takes one test's observation, and refuses it if rows are lost or doubled."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(
        self,
        injected: str,
        promised: str,
        *,
        given: Iterable[object],
        made: Iterable[object],
        redone: int | None = None,
        recovered_s: float | None = None,
        exits: Iterable[int] = (0,),
        said: str = "",
    ) -> None:
        """`given` and `made` are the ids of the input's and the output's rows."""
        wanted, found = Counter(given), Counter(made)
        observation = Observation(
            injected,
            promised,
            lost=sum((wanted - found).values()),
            doubled=sum((found - wanted).values()),
            redone="" if redone is None else f"{redone} of {wanted.total():,}",
            recovered_s=None if recovered_s is None else round(recovered_s, 1),
            exits=", ".join(map(str, exits)),
            said=said if len(said) <= SAID else said[:SAID] + "…",
        )
        FOLDER.mkdir(parents=True, exist_ok=True)
        file = FOLDER / f"{self._name}.json"
        file.write_text(json.dumps(asdict(observation), ensure_ascii=False, indent=1))
        assert (observation.lost, observation.doubled) == (0, 0)


@pytest.fixture
def observe(request: pytest.FixtureRequest) -> Observer:
    module = request.node.module.__name__.rpartition(".")[2].removeprefix("test_")
    name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-")
    return Observer(f"{module}.{name}")


def table() -> str:
    """All observations as Markdown."""
    head = [field.name.replace("recovered_s", "recovered in s") for field in fields(Observation)]
    lines = [head, ["---"] * len(head)]
    for file in sorted(FOLDER.glob("*.json")):
        values = json.loads(file.read_text()).values()
        lines.append(["" if value is None else str(value) for value in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
