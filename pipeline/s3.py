"""S3 that may falter: what passes is waited for, and an answer that was lost is found out.

Throttling, 5xx, time-outs and broken connections are tried again, at random moments of growing
intervals ("full jitter"), for PATIENCE_S; for FIRST_ANSWER_S only while this store has not answered
the job yet, as its address may be wrong. What S3 refuses (403, 404, 412) is not tried again.

A write may succeed though its answer is lost; its repetition then meets its own work: an object
that is there, an upload that is complete. So objects carry the id of the attempt that wrote them.
"""

from __future__ import annotations

import asyncio
import io
import random
import sys
import time
import uuid
from collections.abc import Collection
from datetime import datetime
from itertools import count
from typing import Any

import s3fs
from aiohttp import ClientError as HttpError
from botocore.exceptions import (  # type: ignore[import-untyped]
    ConnectionError as NoConnection,
)
from botocore.exceptions import HTTPClientError, IncompleteReadError
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from fsspec.asyn import sync_wrapper

from pipeline.signals import interrupted

PATIENCE_S = 600.0
FIRST_ANSWER_S = 5.0
FIRST_INTERVAL_S = 0.5
LONGEST_INTERVAL_S = 30.0
SENDING_S = 60.0
SLOWEST_BYTES_PER_S = 100_000
"""A PUT may take SENDING_S, and its content this rate. aiohttp's time-out begins when all is sent:
a store that stops to read would be waited for without end."""

NO_REPLY = (NoConnection, HTTPClientError, IncompleteReadError, HttpError, TimeoutError,
            ConnectionError, ResponseParserError)  # fmt: skip
"""What the layers below raise if no reply came, or only a part of one."""

PASSING_CODES = frozenset({
    "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests",
    "RequestLimitExceeded", "BandwidthLimitExceeded",
    "OperationAborted", "ConditionalRequestConflict",  # another write of the same key is under way
    "BadDigest", "XAmzContentSHA256Mismatch",  # bytes that were damaged under way
})  # fmt: skip
"""Replies 4xx that pass all the same; S3's own names."""

ATTEMPT = "axbatch-attempt"
"""Key of the object metadata that holds the attempt id."""


class PatientS3(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs is untyped
    """s3fs with patience in every request. Raises what the last attempt raised."""

    has_answered = False
    """Whether this store has answered before: in this process, or in the one that asked this one
    to go on."""

    connect_timeout, read_timeout = 5, 15  # seconds, of one attempt
    retries = 1  # in s3fs, and as many in botocore: theirs would multiply ours

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        return {
            **super()._prepare_config_kwargs(),
            "retries": {"total_max_attempts": 1},
            # Else a PUT over https ends in a trailer with a checksum, which older Ceph and MinIO
            # and GCS refuse; without one, the request's signature covers its content.
            "request_checksum_calculation": "when_required",
        }

    async def _call_s3(self, method: str, *defaults: Any, **arguments: Any) -> Any:
        try:
            return await self._patiently(method, *defaults, **arguments)
        except FileNotFoundError as error:
            if code_of(error) != "NoSuchUpload":
                raise
            # Completed or given up already: by an attempt whose answer was lost, or by others.
            if method == "abort_multipart_upload":
                return {}
            bucket, key = arguments["Bucket"], arguments["Key"]
            if method == "complete_multipart_upload" and await self._holds(
                bucket, key, defaults[0]["Metadata"][ATTEMPT]
            ):
                return {}
            raise OSError("someone else has ended this upload") from error

    call_s3 = sync_wrapper(_call_s3)

    async def _patiently(self, method: str, *defaults: Any, **arguments: Any) -> Any:
        began = time.monotonic()
        for attempt in count():
            try:
                answer = await self._ask(method, *defaults, **arguments)
            except Exception as error:
                if not is_passing(error):
                    self.has_answered |= status_of(error) is not None
                    raise
                # Abandoned pieces cost room, not rows: whoever clears up needn't wait for long.
                is_patient = self.has_answered and method != "abort_multipart_upload"
                left = began + (PATIENCE_S if is_patient else FIRST_ANSWER_S) - time.monotonic()
                if left <= 0 or interrupted.is_set():
                    raise
                if attempt == 0:
                    what = code_of(error) or error
                    # Not to stdout, where a command's JSON may go; a run's log takes both.
                    print(f"axbatch: S3: {what}; trying again for {left:.0f} s",
                          file=sys.stderr, flush=True)  # fmt: skip
                longest = min(LONGEST_INTERVAL_S, FIRST_INTERVAL_S * 2 ** min(attempt, 10))
                pause = min(left, random.uniform(0, longest))  # noqa: S311
                await asyncio.to_thread(interrupted.wait, pause)
            else:
                self.has_answered = True
                return answer

    async def _ask(self, method: str, *defaults: Any, **arguments: Any) -> Any:
        limit_s = None
        if "Body" in arguments:
            limit_s = SENDING_S + len(arguments["Body"]) / SLOWEST_BYTES_PER_S
        async with asyncio.timeout(limit_s):
            answer = await super()._call_s3(method, *defaults, **arguments)
        if method == "get_object":
            # Here, so that a content which breaks off is a fault of this request.
            async with answer["Body"] as body:
                answer["Body"] = Content(await body.read())
        return answer

    async def _put_if_absent(self, path: str, data: bytes) -> bool:
        """Create an object in one request. False if it was there, and was not ours."""
        bucket, key, _ = self.split_path(path)
        attempt = uuid.uuid4().hex
        try:
            await self._call_s3(
                "put_object",
                Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={ATTEMPT: attempt},
            )  # fmt: skip
        except OSError as error:
            if status_of(error) != 412:
                raise
            return await self._holds(bucket, key, attempt)
        return True

    put_if_absent = sync_wrapper(_put_if_absent)

    async def _holds(self, bucket: str, key: str, attempt: str) -> bool:
        """Whether the object is what `attempt` wrote. False if it has been deleted since."""
        try:
            head = await self._call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            return False
        return bool(head.get("Metadata", {}).get(ATTEMPT) == attempt)

    async def _abort_uploads(self, path: str, own: Collection[str], before: datetime) -> None:
        """Give up the uploads below a folder that began before this time, to `own` files or below
        `_axbatch`."""
        bucket, key, _ = self.split_path(path)
        prefix = f"{key}/" if key else ""
        page: dict[str, Any] = {"IsTruncated": True}
        while page["IsTruncated"]:
            page = await self._call_s3(
                "list_multipart_uploads",
                Bucket=bucket, Prefix=prefix,
                KeyMarker=page.get("NextKeyMarker", ""),
                UploadIdMarker=page.get("NextUploadIdMarker", ""),
            )  # fmt: skip
            for upload in page.get("Uploads", ()):
                name = upload["Key"].removeprefix(prefix)
                is_own = name in own or name.startswith("_axbatch/")
                if is_own and upload["Initiated"] < before:
                    await self._call_s3(
                        "abort_multipart_upload",
                        Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"],
                    )  # fmt: skip

    abort_uploads = sync_wrapper(_abort_uploads)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb":  # s3fs then gives this to each of the file's requests, see `_call_s3`
            options["Metadata"] = {ATTEMPT: uuid.uuid4().hex}
        return super()._open(path, mode, **options)

    async def _walk(
        self, path: str, maxdepth: int | None = None, on_error: Any = None, **options: Any
    ) -> Any:
        """As s3fs's, which leaves out a folder that it can't list, as if it were empty."""
        async for found in super()._walk(path, maxdepth, on_error=_unless_gone, **options):
            yield found

    async def _cat_file(self, path: str, *args: Any, **options: Any) -> Any:
        """As s3fs's, in one request: it asks for the size first, to read large ones in pieces."""
        return await super()._cat_file(path, *args, **{**options, "max_concurrency": 1})

    async def _find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool | None = None,
        detail: bool = False,
        prefix: str = "",
        **options: Any,
    ) -> Any:
        """As s3fs's, which asks twice more where it finds nothing, as of crashes nearly always."""
        if maxdepth is not None or withdirs or prefix:
            return await super()._find(path, maxdepth, withdirs, detail, prefix, **options)
        found = {each["name"]: each for each in await self._lsdir(path, delimiter="", **options)}
        return found if detail else [*found]

    def isfile(self, path: str) -> bool:
        """As fsspec's, which takes every fault for a no."""
        try:
            return bool(self.info(path)["type"] == "file")
        except (FileNotFoundError, PermissionError):  # some may list a folder, but not ask for it
            return False


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


class Content(io.BytesIO):
    """The content of an object, all of it here, as s3fs wants to read it."""

    async def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        return super().read(size)


def is_passing(error: Exception) -> bool:
    """Whether the same request may be answered a little later."""
    status = status_of(error)
    if status is None:
        return isinstance(error, NO_REPLY)
    is_server_fault = status >= 500 and status != 501  # Not Implemented
    return is_server_fault or status in (408, 429) or code_of(error) in PASSING_CODES


def status_of(error: Exception) -> int | None:
    """HTTP status of the reply that `error` stands for; None if there was no reply."""
    status: int | None = _reply(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def code_of(error: Exception) -> str:
    """S3's own name of the error, or its status where the reply had none; empty without reply."""
    return str(_reply(error).get("Error", {}).get("Code", ""))


def _reply(error: Exception) -> dict[str, Any]:
    # s3fs turns botocore's errors into OSErrors, with these as their cause.
    reply: dict[str, Any] | None = getattr(error.__cause__, "response", None)
    return reply or {}
