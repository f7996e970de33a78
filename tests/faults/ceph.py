"""A real S3 server that can be broken and mended: Ceph's RGW, see start_s3.sh."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import START_S3

USER = "--uid=test"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testkey",
    "AWS_SECRET_ACCESS_KEY": "testsecret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class Ceph:
    """Its daemons run in `folder`. A fault of a block ends with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.endpoint = ""

    def start(self) -> None:
        self.endpoint = self._run("bash", str(START_S3), "start", str(self._folder))

    def stop(self) -> None:
        self._run("bash", str(START_S3), "stop", str(self._folder))

    @contextmanager
    def one_request_at_a_time(self) -> Iterator[None]:
        """All others get 503 SlowDown."""
        setting = ("client.rgw", "rgw_max_concurrent_requests")
        self._run("ceph", "config", "set", *setting, "1")
        yield
        self._run("ceph", "config", "rm", *setting)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Requests are taken, and not answered until the block has ended."""
        self._run("ceph", "osd", "set", "pause")
        yield
        self._run("ceph", "osd", "unset", "pause")

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nobody listens."""
        os.kill(int((self._folder / "client.rgw.pid").read_text()), signal.SIGKILL)
        yield
        self._run("radosgw", "-n", "client.rgw")

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """403 for the user."""
        self._run("radosgw-admin", "user", "suspend", USER)
        yield
        self._run("radosgw-admin", "user", "enable", USER)

    def allow(self, objects: int | None) -> None:
        """403 QuotaExceeded for more objects than these in the bucket; None: no limit."""
        quota, scope = ("radosgw-admin", "quota"), ("--quota-scope=bucket", USER)
        if objects is None:
            self._run(*quota, "disable", *scope)
        else:
            self._run(*quota, "set", *scope, f"--max-objects={objects}")
            self._run(*quota, "enable", *scope)

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self._folder.parent,
            env={**os.environ, "CEPH_CONF": str(self._folder / "ceph.conf")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def ceph(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Ceph]:
    """A server of the test's own, with the bucket `axbatch`; the environment names it."""
    import s3fs

    if shutil.which("radosgw") is None:
        pytest.skip("no S3 server: Ceph's radosgw is not installed")
    server = Ceph(tmp_path_factory.mktemp("ceph") / "s3")
    try:
        server.start()
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server.endpoint}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("axbatch")
        yield server
    finally:
        server.stop()
