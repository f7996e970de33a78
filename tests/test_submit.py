"""Submitting: the same job from everywhere, under an id of its own, with the user's own modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from pipeline.config import JobConfig
from pipeline.imports import import_named, modules_in
from pipeline.submit import copy_own_modules, next_id, with_absolute_paths
from tests.test_config import BASE, changed, identity


@pytest.mark.parametrize("option", ["tokenizer", "hf_config_path", "chat_template"])
def test_identity_and_submission_mean_the_same_path_from_everywhere(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if option == "chat_template":
        (tmp_path / "here").write_text("x", encoding="utf-8")
    else:
        (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    relative = changed(f"model.engine.{option}", "here", BASE)
    absolute = changed(f"model.engine.{option}", str(tmp_path / "here"), BASE)
    assert identity(relative) == identity(absolute)
    submitted = with_absolute_paths(JobConfig.model_validate(relative))
    assert submitted.model.engine[option] == str(tmp_path / "here")


@pytest.mark.parametrize(
    ("earlier", "then"),
    [([], "job"), (["job"], "job-2"), (["job-2"], "job-3"), (["job", "job-9", "job-x"], "job-10")],
)
def test_submission_id_is_none_that_ray_has_seen(earlier: list[str], then: str) -> None:
    ended = [SimpleNamespace(submission_id=name, status=JobStatus.FAILED) for name in earlier]
    assert next_id(SimpleNamespace(list_jobs=lambda: ended), "job", "here") == then


def test_modules_of_the_current_directory_travel_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_module.py").write_text("from own_package.part import cut\n")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package/part.py").write_text("from textwrap import shorten as cut\n")
    (tmp_path / "own_package/__pycache__").mkdir(exist_ok=True)
    (tmp_path / "not_imported.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    import_named("own_module:cut")
    try:
        assert [place.name for place in modules_in(tmp_path)] == ["own_module.py", "own_package"]
        there = tmp_path / "there"
        there.mkdir()
        copy_own_modules(there)
        copied = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
        assert copied == {"own_module.py", "own_package/part.py"}
    finally:
        for name in ("own_module", "own_package", "own_package.part"):
            sys.modules.pop(name, None)
