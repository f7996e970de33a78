"""openai-batch: chat requests from a Batch API file, each answered as its body asks."""

from __future__ import annotations

import json
from typing import ClassVar, Literal

from pipeline.config.data import InputFormat
from pipeline.conversations import check_body, decode_json
from pipeline.errors import RowRejected
from pipeline.records import Output, Row
from pipeline.task import Generate, Task

URL = "/v1/chat/completions"


class OpenAIBatch(Task):
    """Send each line's body as it is, sampling included, but for what makes it safe (see
    `conversations.check_body`) and its `model`, in whose place the job's answers. The result is the
    whole `chat.completion` as JSON. An answer that was cut off at `max_tokens` is one all the same,
    as in the API.

    As in vLLM's `run_batch`, `method` is not looked at, and `stream` is refused.
    """

    kind: Literal["openai-batch"]

    input_format: ClassVar[InputFormat] = "openai-batch"
    wants_raw_rows: ClassVar[bool] = True

    @property
    def columns(self) -> list[str]:
        return ["line", "url", "body", "error"]

    async def run(self, row: Row, generate: Generate) -> Output:
        if row["error"] is not None:
            raise RowRejected(f"bad_line: line {row['line']}: {row['error']}")
        if row["url"] != URL:
            raise RowRejected(f"bad_url: must be {URL}, it is {row['url'][:100]}")
        body = check_body(decode_json(row["body"]), generate.clean)
        completion = await generate.send(body)
        return Output(json.dumps(completion.body, ensure_ascii=False))
