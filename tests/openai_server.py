"""A server that speaks OpenAI's chat API over real HTTP and says what a test wants it to say."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Reply = tuple[int, Mapping[str, Any] | str]
"""Status and content, text as it is."""

HANG_UP: Reply = (0, "")
"""The connection ends without a word."""


def answer(text: str | None, **changes: Any) -> Reply:
    """A chat completion."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    usage = {
        "prompt_tokens": 12,
        "completion_tokens": 3,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "served"}
    return 200, {**body, "choices": [choice], "usage": usage, **changes}


def error(status: int, message: str, code: str | None = None) -> Reply:
    return status, {"error": {"message": message, "type": "error", "code": code}}


def text_of(body: Body) -> str:
    """The last message."""
    return str(body["messages"][-1]["content"])


class OpenAIServer(ThreadingHTTPServer):
    """Serves the model `served`. Gives `replies` in turn, then what `respond` makes of a body."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, respond: Callable[[Body], Reply] = lambda body: answer("fine")) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.respond = respond
        self.replies: list[Reply] = []
        self.key: str | None = None
        """That a client must have."""
        self.bodies: list[Body] = []
        """All that was asked, in order."""
        model = {"id": "served", "object": "model"}
        self.models: Reply = 200, {"object": "list", "data": [model]}

    @property
    def asked(self) -> list[str]:
        """The last message of each request, in order."""
        return [text_of(body) for body in self.bodies]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: OpenAIServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(self.server.models)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionAbortedError  # whoever asks was killed meanwhile
        body = json.loads(data)
        self.server.bodies.append(body)
        replies = self.server.replies
        self._send(replies.pop(0) if replies else self.server.respond(body))

    def _send(self, reply: Reply) -> None:
        key = self.server.key
        if key and self.headers["Authorization"] != f"Bearer {key}":
            reply = error(401, "wrong key", "invalid_api_key")
        if reply == HANG_UP:
            raise ConnectionAbortedError
        status, content = reply
        is_text = isinstance(content, str)
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if is_text else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")  # keeps the client's backoff out of a test
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving(server: OpenAIServer) -> Iterator[OpenAIServer]:
    """The server answers inside of the block."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
