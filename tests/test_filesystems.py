"""What filesystems say when they fail, and names of files that are none."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from s3fs.utils import FileExpired

from pipeline.errors import InputError, StorageError
from pipeline.filesystems import absolute_url, filesystem_of, open_input
from pipeline.parquet import input_errors
from pipeline.storage import Folder, find_files


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV])
def test_file_system_without_hard_links_is_named_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def link(*_: object) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(Path, "hardlink_to", link)
    with pytest.raises(StorageError, match=r"no hard links(.|\n)*another disk, or s3://"):
        Folder(str(tmp_path)).create("a", b"1")


class Faulty(io.BytesIO):
    """Fails once it is read."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def read(self, *_: object) -> bytes:
        raise self._error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError("The provided token has expired."), "access denied"),
        (OSError(errno.EBUSY, "busy"), "busy"),
        (FileExpired(errno.EBUSY, "etag"), "was replaced while it was read"),
    ],
)
def test_what_fails_while_it_is_read_is_the_stores_fault_and_not_the_files(
    error: Exception, says: str
) -> None:
    filesystem = SimpleNamespace(
        protocol="s3",
        open=lambda *_, **__: Faulty(error),
        unstrip_protocol=lambda path: f"s3://{path}",
    )
    with (
        pytest.raises(StorageError, match=rf"s3://b/a\.parquet: .*{says}"),
        input_errors("s3://b/a.parquet"),
        open_input(filesystem, "b/a.parquet") as file,
    ):
        file.read(4)


def test_both_names_of_s3_are_one() -> None:
    assert absolute_url("s3a://bucket/a") == "s3://bucket/a"


@pytest.mark.s3
@pytest.mark.parametrize("key", ["data//a.parquet", "data/b//a.parquet"])
def test_key_with_an_empty_part_is_refused(s3_url: str, key: str) -> None:
    filesystem, path = filesystem_of(f"{s3_url}/empty-part-{len(key)}")
    filesystem.pipe_file(f"{path}/{key}", b"1")
    for pattern in ("data", "data/**", key):
        with pytest.raises(InputError, match="of its key is empty"):
            find_files(f"{s3_url}/empty-part-{len(key)}/{pattern}")
