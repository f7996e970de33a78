"""Files and objects by URL: list, read, create atomically, replace atomically.

`create` is the commit of the whole product. On a local disk: temporary file, fsync, hard link to
the final name (fails if it exists), fsync of the directory. On S3: one PUT with `If-None-Match: *`.
Both leave either nothing or the whole file under the final name. S3's multipart completion is not
used for it: some stores ignore the condition there and overwrite.
"""

from __future__ import annotations

import errno
import os
import posixpath
import shutil
import uuid
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from pipeline.errors import InputError, StorageError
from pipeline.filesystems import (
    absolute_url,
    filesystem_of,
    open_input,
    protocols_of,
    storage_errors,
)

NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)
"""What file systems without them say, each its own."""

MULTIPART_BYTES, MOST_PIECES = 64 << 20, 10_000
"""Of a large upload: the size of a piece, unless so many are too few. S3 takes no more."""

RACERS = 8
DELETED_AT_ONCE = 16
LEFT_AFTER = timedelta(days=1)
"""So long that no clock is that wrong, and no upload that slow."""


@dataclass(frozen=True, order=True)
class Entry:
    """A file: its path below the folder that was listed, its size in bytes, and a tag that
    changes when the content is replaced (etag on object stores, mtime in seconds on disk)."""

    path: str
    size: int
    tag: str

    @property
    def fingerprint(self) -> str:
        return f"{self.size}:{self.tag}"


class Folder:
    """A folder on local disk or an object store. Paths are relative to it, with `/`.

    `has_answered`: whether the store has answered before, so that it is worth waiting for.
    """

    def __init__(self, url: str, has_answered: bool = False) -> None:
        self.url = absolute_url(url)
        self.filesystem, self.root = filesystem_of(self.url)
        if self.root.strip("/") and not self.url.endswith("://"):
            self.url = self.url.rstrip("/")  # as files of it are named in messages
        self.is_local = "file" in protocols_of(self.filesystem)
        if has_answered:
            self.filesystem.has_answered = True

    def __reduce__(self) -> tuple[type[Folder], tuple[str, bool]]:
        return type(self), (self.url, getattr(self.filesystem, "has_answered", False))

    def full(self, path: str) -> str:
        """The filesystem's own path of `path`. Raises StorageError if it leaves the folder."""
        joined = posixpath.normpath(posixpath.join(self.root, path))
        if joined != self.root.rstrip("/") and not joined.startswith(self.root.rstrip("/") + "/"):
            raise StorageError(f"{path}: lies outside {self.url}")
        return joined

    def list(self, path: str = "") -> list[Entry]:
        """All files below `path`, sorted; empty if there is no such folder."""
        top = self.full(path)
        with storage_errors(self.url):
            try:
                found = self.filesystem.find(top, detail=True)
            except FileNotFoundError:
                return []
        base = self.root.rstrip("/") + "/"
        return sorted(
            _entry(name.removeprefix(base), info)
            for name, info in found.items()
            if not _stands_for_a_folder(name, base)
        )

    def entry(self, path: str) -> Entry:
        """The file `path` as it is now. Raises FileNotFoundError."""
        with storage_errors(f"{self.url}/{path}"):
            return _entry(path, self.filesystem.info(self.full(path)))

    def exists(self, path: str) -> bool:
        with storage_errors(self.url):
            return bool(self.filesystem.exists(self.full(path)))

    def open(self, path: str) -> pa.NativeFile:
        """A file to read at any position. The caller closes it."""
        with storage_errors(f"{self.url}/{path}"):
            return open_input(self.filesystem, self.full(path))

    def read(self, path: str) -> bytes:
        with storage_errors(f"{self.url}/{path}"):
            return cast(bytes, self.filesystem.cat_file(self.full(path)))

    def create(self, path: str, data: bytes) -> bool:
        """Write a whole file, or nothing. False if the name was taken: first writer wins."""
        with storage_errors(f"{self.url}/{path}"), _missing_folder(self.url):
            if self.is_local:
                return self._link(path, data)
            return bool(self.filesystem.put_if_absent(self.full(path), data))

    def replace(self, path: str, data: bytes) -> None:
        """Write a whole file over what may be there; readers see the old or the new one."""
        with self.replacing(path) as sink:
            sink.write(data)

    @contextmanager
    def replacing(self, path: str, expected_bytes: int = 0) -> Iterator[IO[bytes]]:
        """A sink for a large file that appears under its name only if the block ends well. Of
        more than `expected_bytes`, 640 GB at least, an object store may refuse the rest."""
        with storage_errors(f"{self.url}/{path}"), _missing_folder(self.url):
            if self.is_local:
                with self._temporary() as (sink, temporary):
                    yield sink
                    _flush(sink)
                    final = Path(self.full(path))
                    final.parent.mkdir(parents=True, exist_ok=True)
                    temporary.replace(final)
                    _sync_directory(final.parent)
                return
            piece = max(MULTIPART_BYTES, -(-expected_bytes // MOST_PIECES))
            sink = self.filesystem.open(self.full(path), "wb", autocommit=False, block_size=piece)
            try:
                yield sink
                sink.autocommit = True  # not before, or whoever closes it publishes half a file
                sink.flush(force=True)  # all in one PUT, if it fits in one piece
            except BaseException:
                sink.closed = True  # else its finaliser goes on with the upload
                sink.discard()
                raise

    def winners_of_a_race(self) -> int:
        """Of RACERS that create the same file at once, how many are told that they did. More than
        one: the store's conditional writes race, and a second writer replaces the first one's
        file by its own, whole by whole."""
        path = f"_axbatch/tmp/race-{uuid.uuid4().hex}"
        with ThreadPoolExecutor(RACERS) as pool:
            won = sum(pool.map(lambda racer: self.create(path, b"%d" % racer), range(RACERS)))
        self.delete(path)
        return won

    def sweep(self, own: Collection[str]) -> None:
        """Remove what writers left behind that died more than LEFT_AFTER ago: temporary files, and
        on S3 the pieces of uploads to `own` files or below `_axbatch`, which cost money and are
        never listed."""
        oldest = datetime.now(UTC) - LEFT_AFTER
        with storage_errors(self.url):
            if not self.is_local:
                self.filesystem.abort_uploads(self.root, own, oldest)
                return
            for path in Path(self.full("_axbatch/tmp")).glob("*"):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < oldest.timestamp():
                        path.unlink()

    def delete(self, path: str) -> None:
        """Remove a file; fine if it is gone already."""
        with storage_errors(f"{self.url}/{path}"), suppress(FileNotFoundError):
            self.filesystem.rm_file(self.full(path))

    def delete_folder(self, path: str) -> None:
        """Remove a folder and all below it; fine if it is gone already."""
        if self.is_local:
            with storage_errors(f"{self.url}/{path}"):
                shutil.rmtree(self.full(path), ignore_errors=True)
            return
        # By their listed names: fsspec's own `rm` takes brackets and stars in a name for a glob.
        with ThreadPoolExecutor(DELETED_AT_ONCE) as pool, storage_errors(f"{self.url}/{path}"):
            names = [self.full(entry.path) for entry in self.list(path)]
            for _ in pool.map(self.filesystem.rm_file, names):
                pass

    @contextmanager
    def _temporary(self) -> Iterator[tuple[IO[bytes], Path]]:
        # On the output's own filesystem, and in a folder that readers of the output skip.
        temporary = Path(self.full(f"_axbatch/tmp/{uuid.uuid4().hex}"))
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as sink:
            try:
                yield sink, temporary
            finally:
                temporary.unlink(missing_ok=True)

    def _link(self, path: str, data: bytes) -> bool:
        final = Path(self.full(path))
        final.parent.mkdir(parents=True, exist_ok=True)
        with self._temporary() as (sink, temporary):
            sink.write(data)
            _flush(sink)
            try:
                final.hardlink_to(temporary)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_HARD_LINKS:
                    raise
                raise StorageError(
                    f"{self.url}/{path}: this file system has no hard links between folders, by "
                    "which results are committed",
                    "Choose an `output.path` on another disk, or s3://.",
                ) from error
        _sync_directory(final.parent)
        return True


@contextmanager
def _missing_folder(url: str) -> Iterator[None]:
    """Writing makes its own folders; what is missing then is the bucket, or the disk."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(
            f"{url}: no such bucket or folder", "Create it, or change `output.path`."
        ) from error


def find_files(url: str) -> tuple[Folder, list[Entry]]:
    """Resolve a file, folder or glob into its root folder and the data files below it.

    The root is the folder itself, the file's folder, or the part of a glob before its first
    wildcard: what output names are relative to. Names with a part that starts with `_` or `.`
    are skipped, as Hive's readers do.

    Raises:
        InputError: nothing there.
    """
    url = absolute_url(url)
    filesystem, path = filesystem_of(url)
    if "//" in path.strip("/"):  # of an object store alone: another object than without it
        raise InputError(f"{url}: a part of its key is empty", "Rename it: keys have no `//`.")
    with storage_errors(url):
        if filesystem.isfile(path):
            found, root = {path: filesystem.info(path)}, posixpath.dirname(path)
            what = "no such file"
        elif any(wildcard in path for wildcard in "*?["):
            found = {k: v for k, v in filesystem.glob(path, detail=True).items()
                     if v["type"] != "directory"}  # fmt: skip
            literal = path[: min(path.find(w) for w in "*?[" if w in path)]
            root, what = posixpath.dirname(literal), "no file matches"
        elif filesystem.isdir(path):
            found, root, what = filesystem.find(path, detail=True), path, "the folder is empty"
        else:
            raise InputError(f"{url}: no such file or folder", "Check `input.path`.")
    base = root.rstrip("/") + "/"
    entries = sorted(
        _entry(name.removeprefix(base), info)
        for name, info in found.items()
        if not _stands_for_a_folder(name, base)
    )
    visible = [e for e in entries if not any(p[:1] in ("_", ".") for p in e.path.split("/"))]
    if not visible:
        raise InputError(f"{url}: {what}", "Check `input.path`.")
    odd = {name.removeprefix(base) for name, info in found.items() if info["type"] != "file"}
    for entry in visible:
        if posixpath.normpath(f"a/{entry.path}") != f"a/{entry.path}":  # of an object store alone
            raise InputError(
                f"{base}{entry.path}: a part of its key is empty, or dots",
                "Rename it, or narrow `input.path`.",
            )
        if not entry.path.isascii() and any("\ud800" <= c <= "\udfff" for c in entry.path):
            raise InputError(
                f"{base}{ascii(entry.path)[1:-1]}: its name is not UTF-8",
                "Rename it, or narrow `input.path`.",
            )
        if entry.path in odd:
            raise InputError(
                f"{base}{entry.path}: is no file (a link to a folder, or to nothing)",
                "Name the folder itself in `input.path`, or remove the link.",
            )
    return Folder(filesystem.unstrip_protocol(root) if "://" in url else root), visible


def _stands_for_a_folder(name: str, base: str) -> bool:
    """Whether it is no file, but what some tools put into an object store for a folder."""
    return name.endswith("/") or f"{name}/" == base


def _entry(path: str, info: dict[str, Any]) -> Entry:
    for key in ("ETag", "etag", "blob_id", "LastModified", "mtime"):
        if info.get(key) is not None:
            return Entry(path, int(info["size"]), str(info[key]).strip('"'))
    return Entry(path, int(info["size"]), "")


def _flush(sink: IO[bytes]) -> None:
    sink.flush()
    os.fsync(sink.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
