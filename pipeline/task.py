"""What a task kind is: its keys in the job file, and one async function over a row."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol

import pyarrow as pa

from pipeline.config import Section
from pipeline.records import Completion, Message, Output, Row


class Generate(Protocol):
    """Ask the model. Sampling comes from the job file; keywords override or add body keys.

    Raises RowRejected where the request can't be done as asked (too long, say) and RowFailed
    where the engine failed; a task may let both pass: they become the row's status.
    """

    async def __call__(self, messages: list[Message], **body: Any) -> Completion: ...


class Task(Section):
    """Base of all kinds. A kind's fields are its keys under `task:` in the job file."""

    kind: str

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Input columns that `run` reads; only these travel to the workers."""

    @property
    def output_type(self) -> pa.DataType:
        """Arrow type of the result column."""
        return pa.string()

    def identity(self) -> dict[str, Any]:
        """All that decides the output: the fields, and the prompts where code makes them."""
        return self.model_dump(exclude_defaults=False)

    @abstractmethod
    async def run(self, row: Row, generate: Generate) -> Output:
        """Process one row. Text in `row` is NFC and free of the model's special tokens."""
