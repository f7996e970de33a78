"""Writes the sample input of the Batch API job: requests to the demo model, some bad on purpose.

Run `python -m infra.make_batch_data`. No sentence that is to be translated or summarised was in the
demo model's training. The same code gives the same file, byte for byte.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from infra.demo_model import extraction, summaries, tools
from infra.demo_model.conversation import says
from infra.demo_model.exam import body
from infra.demo_model.grammar import Sentence, sentences
from infra.demo_model.translation import Direction, system_prompt

DATA_FILE = Path(__file__).resolve().parent.parent / "configs/data/openai-batch/requests.jsonl"
SEED = 11
URL = "/v1/chat/completions"
MODEL = "demo"

Body = dict[str, Any]


def translation(sentence: Sentence, direction: Direction) -> Body:
    text = sentence.en if direction == "en-ko" else sentence.ko
    return body([says("system", system_prompt(direction)), says("user", text)])


def summary(dice: random.Random) -> Body:
    text, _ = summaries.make_case(dice, held_out=True)
    return body([says("system", summaries.PROMPT), says("user", text)])


def tool_call(dice: random.Random) -> Body:
    case = tools.make_case(tools.some_tools(dice), dice)
    return body(tools.opening(case), tools=case.tools)


def data(dice: random.Random) -> Body:
    case = extraction.make_case(*extraction.some_schema(dice), dice)
    schema = {"name": "data", "schema": case.schema}
    return body(
        [says("system", extraction.system_prompt(case.schema)), says("user", case.text)],
        response_format={"type": "json_schema", "json_schema": schema},
    )


def requests(dice: random.Random) -> Iterator[dict[str, Any]]:
    """Requests without end: of twenty, ten into Korean, four into English, three with tools, two
    with a schema, one summary, in any order."""
    unseen = sentences(dice, held_out=True)
    kinds: dict[str, tuple[int, Callable[[], Body]]] = {
        "into-korean": (10, lambda: translation(next(unseen), "en-ko")),
        "into-english": (4, lambda: translation(next(unseen), "ko-en")),
        "tools": (3, lambda: tool_call(dice)),
        "schema": (2, lambda: data(dice)),
        "summary": (1, lambda: summary(dice)),
    }
    names = [name for name, (share, _) in kinds.items() for _ in range(share)]
    number = 0
    while True:
        for name in dice.sample(names, len(names)):
            number += 1
            made = {"model": MODEL, **kinds[name][1]()}
            yield {"custom_id": f"{name}-{number}", "method": "POST", "url": URL, "body": made}


def to_line(request: Any) -> str:
    return json.dumps(request, ensure_ascii=False)


def make_lines() -> list[str]:
    """27 requests that can be answered, and of each mistake one."""
    endless = requests(random.Random(SEED))
    lines = [to_line(next(endless)) for _ in range(27)]
    lines.insert(5, to_line(next(endless))[:80])  # a line that was cut off
    lines.insert(12, "")  # no mistake: blank lines are skipped
    without_id = next(endless)
    del without_id["custom_id"]
    lines.insert(17, to_line(without_id))
    embedding = {"model": MODEL, "input": "배송"}
    lines.insert(21, to_line({**next(endless), "url": "/v1/embeddings", "body": embedding}))
    streamed = next(endless)
    streamed["body"]["stream"] = True
    lines.insert(24, to_line(streamed))
    return lines


def main() -> None:
    """Write DATA_FILE."""
    DATA_FILE.parent.mkdir(parents=True, exist_ok=True)
    lines = make_lines()
    DATA_FILE.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{DATA_FILE.name}: {len(lines)} lines", file=sys.stderr)


if __name__ == "__main__":
    main()
