"""The filesystems below storage: fsspec's, as we need them, and what they say when they fail."""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import AxbatchError, JobFileError, StorageError

CHECK_ADDRESS = "Check the address (for S3: AWS_ENDPOINT_URL) and the network."


def absolute_url(url: str) -> str:
    """A URL as it is, but for its other name of S3; a local path absolute, without `~`, `..`."""
    if url.startswith("s3a://"):
        return f"s3://{url.removeprefix('s3a://')}"
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))  # noqa: PTH100, PTH111


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for `url` and the path in it. Raises JobFileError if unknown."""
    if url.startswith(("s3://", "s3a://")):
        from pipeline.s3 import PatientS3  # takes its time, which local paths needn't

        # A cached listing hides parts that other processes have committed meanwhile; Cloudflare's
        # R2 wants all pieces of an upload to be of one size.
        filesystem = PatientS3(use_listings_cache=False, fixed_upload_size=True)
        path = filesystem._strip_protocol(url)
        if not path:
            raise JobFileError(f"{url}: names no bucket", "Give s3://BUCKET/PATH.")
        return filesystem, path
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise JobFileError(f"{url}: {_short(error)}", "Known: local paths, s3://, hf://.") from None
    return LocalFiles() if type(filesystem) is LocalFileSystem else filesystem, path


class LocalFiles(LocalFileSystem):  # type: ignore[misc]
    """Lists a link as the file that it leads to, and says when it cannot list a folder: fsspec's
    own takes the former for no file, and the latter for empty."""

    def info(self, path: Any, **options: Any) -> dict[str, Any]:
        info: dict[str, Any] = super().info(path, **options)
        if info["islink"] and isinstance(path, os.DirEntry):
            with suppress(OSError):  # it leads to nothing, or to itself
                target: dict[str, Any] = super().info(info["name"])
                if target["type"] == "file":
                    return target
        return info

    def walk(
        self, path: Any, maxdepth: Any = None, topdown: bool = True, *_: Any, **options: Any
    ) -> Any:
        def stop(error: OSError) -> None:
            name = posixpath.basename(str(error.filename or ""))
            is_gone = isinstance(error, FileNotFoundError)  # removed meanwhile
            if not (is_gone or name.startswith(".") or name == "lost+found"):  # of a disk's root
                raise error

        return super().walk(path, maxdepth, topdown, stop, **options)


def open_input(filesystem: Any, path: str) -> pa.NativeFile:
    """A readable, seekable Arrow file: native on disk, through fsspec elsewhere."""
    if "file" in protocols_of(filesystem):
        return pa.OSFile(path, "rb")
    # Arrow asks for exact ranges; fsspec's read-ahead would fetch most of them twice.
    file = filesystem.open(path, "rb", cache_type="none")
    return pa.PythonFile(_Read(file, filesystem.unstrip_protocol(path)), mode="r")


class _Read:
    """A file of fsspec. What goes wrong while Arrow reads it is told as when it is opened."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def read(self, size: int = -1) -> bytes:
        with storage_errors(self._url):
            return bytes(self._file.read(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what filesystems raise into errors that say what to do. FileNotFoundError passes."""
    try:
        yield
    except (AxbatchError, FileNotFoundError, pa.ArrowException):
        raise
    except NotADirectoryError as error:
        raise JobFileError(
            f"{url}: a file is in the way of a folder", "Choose another `output.path`."
        ) from error
    except PermissionError as error:
        hint = "Check the credentials and their rights."
        if "RequestTimeTooSkewed" in _short(error):
            hint = "Set this machine's clock; the store refuses what is signed at another time."
        raise StorageError(f"{url}: access denied ({_short(error)})", hint) from error
    except OSError as error:
        hint = "Nothing half-written counts; run the same command again once storage is back."
        if error.errno == errno.ENOSPC:
            hint = "Free some space, then run the same command again."
        elif type(error).__name__ == "FileExpired":  # s3fs': it has another etag now
            raise StorageError(
                f"{url}: was replaced while it was read", "Run the same command again."
            ) from error
        elif type(error).__module__.startswith("botocore"):
            hint = CHECK_ADDRESS
        raise StorageError(f"{url}: {_short(error)}", hint) from error
    except Exception as error:
        # Most of botocore's errors share no base with OSError; none is importable without it.
        libraries = ("botocore", "aiobotocore", "aiohttp", "huggingface_hub", "httpx")
        is_endpoint = isinstance(error, ValueError) and "endpoint" in str(error)
        if not (type(error).__module__.startswith(libraries) or is_endpoint):
            raise
        is_credentials = any(word in type(error).__name__ for word in ("redential", "Profile"))
        hint = (
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or an instance role."
            if is_credentials
            else CHECK_ADDRESS
        )
        raise StorageError(f"{url}: {_short(error)}", hint) from error


def protocols_of(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _short(error: BaseException) -> str:
    # s3fs turns a reply without a message into OSError("None"); the reply has a code at least.
    response = getattr(error.__cause__, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    text = " ".join(str(error).split()).removesuffix("None").strip()
    return text[:300] or code or type(error).__name__
