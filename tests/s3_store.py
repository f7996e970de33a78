"""A small S3 server over real HTTP, for what a real one cannot be made to do on request: faults at
chosen requests, and conditional writes that race."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

PAGE = 2
"""Names in one answer to a listing."""
RACE_S = 0.3
"""Between the look and the write of a conditional PUT, where these race."""

FAULTS = {
    "SlowDown": 503, "InternalError": 500, "BadGateway": 502, "TooManyRequests": 429,
    "closed": 0, "lost answer": 0,
}  # fmt: skip
"""All that passes: S3's code with its status, or what happens to the connection (0)."""
FAULTS_OF_WRITES = {"RequestTimeout": 400, "ConditionalRequestConflict": 409}
REFUSALS = {
    "AccessDenied": 403, "QuotaExceeded": 403, "UserSuspended": 403, "InvalidRequest": 400,
    "NotImplemented": 501,
}  # fmt: skip
STATUS = {
    **FAULTS, **FAULTS_OF_WRITES, **REFUSALS,
    "NoSuchKey": 404, "NoSuchUpload": 404, "PreconditionFailed": 412,
}  # fmt: skip

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, content."""


class Store(ThreadingHTTPServer):
    """As much of S3 as objects, listings and uploads in pieces, in one bucket."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        """Content and metadata by key."""
        self.uploads: dict[str, tuple[dict[int, bytes], dict[str, str]]] = {}
        """Pieces and metadata by upload id."""
        self.asked: list[str] = []
        """The requests since the last `fail`, for instance `PUT a/b` or `POST a/b?uploads`."""
        self.faults: Iterator[str | None] = iter(())
        self.deaf_to = 0
        """So many of the next PUTs are not listened to once they offer their content."""
        self.races = False
        """Whether a conditional PUT looks for the object first, and writes a moment later."""
        self.overwritten = 0
        """Objects that a conditional PUT wrote over, as it had looked too early."""
        self.hidden: set[str] = set()
        """Keys that no reader finds."""
        self.page = PAGE
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def fail(self, *faults: str | None) -> None:
        """What becomes of the next requests, in turn: nothing (None), or one of STATUS; they stay
        "unanswered" until the client gives up; "half" of the content arrives; an error comes
        "late", in an answer that began as a success."""
        self.asked, self.faults = [], iter(faults)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def handle_expect_100(self) -> bool:
        if self.server.deaf_to:
            self.server.deaf_to -= 1
            self.server.closing.wait()
            self.close_connection = True
            return False
        return super().handle_expect_100()

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.key = unquote(parts.path).lstrip("/").partition("/")[2]
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = next((n for n in ("uploads", "uploadId", "list-type") if n in self.query), "")
        if self.server.races and "If-None-Match" in self.headers:
            self._race()
        with self.server.lock:
            self.server.asked.append(f"{self.command} {self.key}{name and '?'}{name}")
            fault = next(self.server.faults, None)
            if fault in (None, "half", "lost answer"):
                answer = self._do()
            else:
                answer = STATUS.get(fault, 200), {}, error(fault)
        if fault == "unanswered":
            self.server.closing.wait()
        if fault in ("unanswered", "closed", "lost answer"):
            self.close_connection = True
        else:
            self._send(*answer, is_whole=fault != "half")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _race(self) -> None:
        """Decide now whether the name is free, long before the object is written."""
        with self.server.lock:
            if self.key in self.server.objects:
                return  # the condition holds
        del self.headers["If-None-Match"]
        self.server.closing.wait(RACE_S)
        with self.server.lock:
            self.server.overwritten += self.key in self.server.objects

    def _send(
        self, status: int, headers: dict[str, str], content: bytes, *, is_whole: bool
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if is_whole else content[: len(content) // 2])
        self.close_connection = not is_whole

    def _do(self) -> Answer:
        objects = self.server.objects
        metadata = {k: v for k, v in self.headers.items() if k.lower().startswith("x-amz-meta-")}
        if "list-type" in self.query:
            return 200, {}, self._list()
        if "uploads" in self.query and self.command == "GET":
            return 200, {}, b"<R><IsTruncated>false</IsTruncated></R>"
        if "uploads" in self.query:
            upload = uuid.uuid4().hex
            self.server.uploads[upload] = {}, metadata
            return 200, {}, f"<R><UploadId>{upload}</UploadId></R>".encode()
        if "uploadId" in self.query:
            return self._go_on(self.query["uploadId"])
        if self.command == "PUT":
            if self.headers.get("If-None-Match") == "*" and self.key in objects:
                return 412, {}, error("PreconditionFailed")
            objects[self.key] = self.body, metadata
            return 200, {"ETag": tag(self.body)}, b""
        if self.command == "DELETE":
            objects.pop(self.key, None)
            return 204, {}, b""
        if self.key not in objects or self.key in self.server.hidden:
            return 404, {}, error("NoSuchKey")
        content, metadata = objects[self.key]
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            return 206, {}, content[int(wanted[1]) : int(wanted[2]) + 1]
        return 200, {"ETag": tag(content), **metadata}, content

    def _go_on(self, upload: str) -> Answer:
        if upload not in self.server.uploads:
            return 404, {}, error("NoSuchUpload")
        pieces, metadata = self.server.uploads[upload]
        if self.command == "PUT":
            pieces[int(self.query["partNumber"])] = self.body
            return 200, {"ETag": tag(self.body)}, b""
        del self.server.uploads[upload]
        if self.command == "DELETE":
            return 204, {}, b""
        numbers = re.findall(rb"<PartNumber>(\d+)</PartNumber>", self.body)
        self.server.objects[self.key] = b"".join(pieces[int(n)] for n in numbers), metadata
        return 200, {}, b"<R/>"

    def _list(self) -> bytes:
        start, size = int(self.query.get("continuation-token", 0)), self.server.page
        keys = sorted(k for k in self.server.objects if k.startswith(self.query["prefix"]))
        page, rest = keys[start : start + size], keys[start + size :]
        contents = "".join(
            f"<Contents><Key>{k}</Key><Size>{len(self.server.objects[k][0])}</Size></Contents>"
            for k in page
        )
        more = f"<NextContinuationToken>{start + size}</NextContinuationToken>" if rest else ""
        whole = f"<IsTruncated>{'true' if rest else 'false'}</IsTruncated>{more}{contents}"
        return f"<R>{whole}</R>".encode()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>as it pleases</Message></Error>".encode()


def tag(content: bytes) -> str:
    return f'"{md5(content, usedforsecurity=False).hexdigest()}"'


@contextmanager
def serving(store: Store) -> Iterator[Store]:
    """The store answers inside of the block."""
    with store:
        thread = threading.Thread(target=store.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield store
        finally:
            store.closing.set()
            store.shutdown()
            thread.join()
