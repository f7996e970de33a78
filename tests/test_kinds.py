"""Task kinds of one's own: files in jobs/ are found, and bugs in them are said where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import jobs
from jobs import kinds, load_task
from pipeline.config.model import ModelConfig
from pipeline.engine.echo import EchoEngine
from pipeline.errors import JobFileError
from pipeline.records import Output
from pipeline.worker import bug_of, checked
from tests.conftest import make_job

MINE = """
from typing import Any, Literal
from pipeline.records import Output
from pipeline.task import Task

class Mine(Task):
    '''Mine.'''
    kind: Literal["my-kind"]

    @property
    def columns(self) -> list[str]:
        return ["text"]

    async def run(self, row: Any, generate: Any) -> Output:
        return Output("done")
"""


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> Any:
    (folder / f"{name}.py").write_text(source)
    monkeypatch.setattr(jobs, "__path__", [*jobs.__path__, str(folder)])
    kind = name.replace("_", "-")
    return load_task(make_job(folder).model_copy(update={"task": {"kind": kind}}))


def test_a_file_is_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path, monkeypatch, "my_kind", MINE).columns == ["text"]
    assert {"my-kind", "translate", "openai-batch"} <= kinds().keys()


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("no_syntax", "def f(:", "jobs/no_syntax.py, line 1: SyntaxError"),
        ("no_module", "\nimport pyarow", "line 2: ModuleNotFoundError: No module named 'pyarow'"),
        ("no_name", "\n\nlength", "line 3: NameError: name 'length' is not defined"),
        ("other_kind", MINE, 'has no class for the kind `other-kind`'),
        ("half_kind", MINE.replace("my-kind", "half-kind").replace("def run", "def walk"),
         "Mine lacks run"),
    ],
)  # fmt: skip
def test_a_broken_kind_is_a_mistake_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, message: str
) -> None:
    with pytest.raises(JobFileError) as error:
        load(tmp_path, monkeypatch, name, source)
    assert message in str(error.value)


TEXTS = pa.list_(pa.string())
MESSAGE = pa.struct([("role", pa.string()), ("n", pa.int64())])


@pytest.mark.parametrize(
    ("value", "of"),
    [
        ("text", pa.string()), ("text", pa.large_string()), (None, TEXTS), (["a", None], TEXTS),
        ([], TEXTS), ({"role": "user"}, MESSAGE), (3, pa.int64()), (2.5, pa.float64()),
    ],
)  # fmt: skip
def test_value_of_the_columns_type_passes(value: Any, of: pa.DataType) -> None:
    assert checked(Output(value), of) == Output(value)


@pytest.mark.parametrize(
    ("returned", "of", "message"),
    [
        ("text", pa.string(), "`run` returned str, not Output"),
        (None, pa.string(), "`run` returned NoneType, not Output"),
        (Output("letters"), TEXTS, "the value is str, the column list<item: string>"),
        (Output(["a"]), pa.string(), "the value is list, the column string"),
        (Output([["a"]]), TEXTS, "the value is list, the column list<item: string>"),
        (Output({"n": "many"}), MESSAGE, "the value is dict, the column struct<"),
    ],
)
def test_value_of_another_type_is_a_bug_of_the_kind(
    returned: Any, of: pa.DataType, message: str
) -> None:
    with pytest.raises(TypeError) as error:
        checked(returned, of)
    assert bug_of(error.value).startswith(message)


def test_a_bug_is_told_by_its_place_without_the_rows_text() -> None:
    with pytest.raises(ValueError, match="secret") as error:
        int("secret")
    assert bug_of(error.value).startswith("ValueError in test_kinds.py, line ")


def test_echo_takes_the_place_of_vllm() -> None:
    options = {"max_num_seqs": 8, "dtype": "float32", "tool_call_parser": "hermes"}
    assert EchoEngine(ModelConfig(id="demo", backend="echo", engine=options)).max_num_seqs == 8
    with pytest.raises(JobFileError, match="seconds_per_request"):
        EchoEngine(ModelConfig(id="x", backend="echo", engine={"seconds_per_requests": 1.0}))
