"""Cores of engines without a GPU: each rank has its own, and none that it may not use."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine import cores as cores_module
from pipeline.engine.cores import omp_binding, usable_cores


@pytest.mark.parametrize(
    ("said", "most"),
    [("max 100000\n", 8), ("400000 100000\n", 4), ("150000 100000\n", 2), ("1000 100000\n", 1)],
)
def test_the_limit_of_a_container_is_not_exceeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, most: int
) -> None:
    monkeypatch.setattr(cores_module.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cores_module, "QUOTA", tmp_path / "cpu.max")
    assert usable_cores() == [*range(8)], "no container"
    (tmp_path / "cpu.max").write_text(said)
    assert usable_cores() == [*range(most)]


@pytest.mark.parametrize(
    ("cores", "ranks", "binding"),
    [
        ([0], 1, "0"),
        ([0, 1], 2, "0|1"),
        ([0, 1, 2, 3], 1, "0,1,2,3"),
        ([2, 3, 6, 7], 2, "2,3|6,7"),
        ([0, 1, 2], 2, "0|1"),
        ([4], 2, "4|4"),
    ],
)
def test_binding_gives_each_rank_its_cores(cores: list[int], ranks: int, binding: str) -> None:
    assert omp_binding(cores, ranks) == binding


@given(st.sets(st.integers(0, 200), min_size=1, max_size=64), st.integers(1, 16))
def test_ranks_never_share_a_core_while_there_are_enough(held: set[int], ranks: int) -> None:
    groups = [group.split(",") for group in omp_binding(sorted(held), ranks).split("|")]
    bound = [int(core) for group in groups for core in group]
    assert len(groups) == ranks
    assert set(bound) <= held
    assert len({len(group) for group in groups}) == 1
    if len(held) >= ranks:
        assert len(set(bound)) == len(bound)
