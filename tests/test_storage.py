"""Storage: a file is there whole or not at all, and the first writer wins; on disk and on S3."""

import errno
import os
import pickle
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

import pipeline.storage
from pipeline.errors import AxbatchError, InputError, StorageError
from pipeline.s3 import PatientS3
from pipeline.storage import Folder, find_files

WRITERS = 24
ROUNDS = 20


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder, once on local disk and once on a real S3 server."""
    if request.param == "disk":
        return Folder(str(tmp_path / "out"))
    return Folder(f"{request.getfixturevalue('s3_url')}/{uuid.uuid4().hex}")


@pytest.fixture
def workers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(WRITERS) as pool:
        yield pool


def put(folder: Folder, *paths: str) -> None:
    for path in paths:
        folder.replace(path, path.encode())


def found(url: str) -> list[str]:
    return [entry.path for entry in find_files(url)[1]]


def test_exactly_one_of_many_racing_writers_creates_the_file(
    folder: Folder, workers: ThreadPoolExecutor
) -> None:
    def write(path: str, start: Barrier, data: bytes) -> bool:
        start.wait()
        return folder.create(path, data)

    for race in range(ROUNDS):
        path, start = f"parts/a/{race}", Barrier(WRITERS)
        contents = [f"writer {n} ".encode() * 1000 for n in range(WRITERS)]
        won = list(workers.map(lambda data: write(path, start, data), contents))  # noqa: B023
        assert won.count(True) == 1
        assert folder.read(path) == contents[won.index(True)]
    assert len(folder.list("parts")) == ROUNDS


def test_created_file_is_never_overwritten_by_create(folder: Folder) -> None:
    assert folder.create("a/b", b"first") is True
    assert folder.create("a/b", b"second, and longer") is False
    assert folder.read("a/b") == b"first"


def test_replaced_file_holds_the_last_content(folder: Folder) -> None:
    folder.create("a", b"first, and longer")
    folder.replace("a", b"second")
    assert folder.read("a") == b"second"
    folder.replace("a", b"")
    assert folder.read("a") == b""


@pytest.mark.parametrize(
    "error", [ValueError("bug"), OSError(28, "disk full"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("written", [0, 10, 11 << 20])
def test_nothing_appears_if_writing_fails_half_way(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, error: BaseException, written: int
) -> None:
    # Smaller pieces, so that S3 has some of them when the upload is given up.
    monkeypatch.setattr(pipeline.storage, "MULTIPART_BYTES", 5 << 20)
    expected = StorageError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), folder.replacing("news.parquet") as sink:
        sink.write(b"x" * written)
        raise error
    assert not folder.exists("news.parquet")
    assert folder.list() == []


def test_old_content_stays_if_replacing_fails_half_way(folder: Folder) -> None:
    folder.create("news.parquet", b"old")
    with pytest.raises(ValueError, match="bug"), folder.replacing("news.parquet") as sink:
        sink.write(b"new")
        raise ValueError("bug")
    assert folder.read("news.parquet") == b"old"


def test_large_file_of_several_pieces_arrives_whole(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.storage, "MULTIPART_BYTES", 5 << 20)
    content = b"".join(n.to_bytes(4, "big") for n in range(3 << 20))
    with folder.replacing("large") as sink:
        for start in range(0, len(content), 1 << 20):
            sink.write(content[start : start + (1 << 20)])
    assert folder.read("large") == content
    assert [entry.size for entry in folder.list()] == [len(content)]


def test_listing_shows_what_others_wrote_since(folder: Folder) -> None:
    put(folder, "parts/a/1")
    assert [entry.path for entry in folder.list("parts")] == ["parts/a/1"]
    put(Folder(folder.url), "parts/a/2", "parts/b/1")
    assert [entry.path for entry in folder.list("parts")] == ["parts/a/1", "parts/a/2", "parts/b/1"]
    assert [entry.path for entry in Folder(f"{folder.url}/parts").list("b")] == ["b/1"]


def test_list_of_a_missing_folder_is_empty(folder: Folder) -> None:
    assert folder.list() == []
    put(folder, "a")
    assert folder.list("parts/none") == []


def test_fingerprint_changes_with_the_content_alone(folder: Folder) -> None:
    put(folder, "a")
    before = folder.list()
    assert folder.list() == before
    folder.replace("a", b"b")
    assert folder.list()[0].size == before[0].size
    assert folder.list()[0].fingerprint != before[0].fingerprint


def test_deleted_folder_takes_nothing_else_along(folder: Folder) -> None:
    put(folder, "parts/a/1", "parts/a/b/2", "parts/ab/3")
    folder.delete_folder("parts/a")
    folder.delete_folder("parts/a")
    assert [entry.path for entry in folder.list()] == ["parts/ab/3"]


@pytest.mark.parametrize("name", ["news [1]", "news*", "a?"])
def test_deleted_folder_is_no_pattern(folder: Folder, name: str) -> None:
    put(folder, f"parts/{name}/x", "parts/news 1/x", "parts/news/x", "parts/ab/x")
    folder.delete_folder(f"parts/{name}")
    kept = [entry.path for entry in folder.list("parts")]
    assert kept == ["parts/ab/x", "parts/news 1/x", "parts/news/x"]


def test_missing_file_is_a_file_not_found_error(folder: Folder) -> None:
    assert not folder.exists("none")
    with pytest.raises(FileNotFoundError):
        folder.read("none")
    with pytest.raises(FileNotFoundError):
        folder.open("none").read()


@pytest.mark.parametrize(
    "path", ["..", "../a", "a/../../b", "/etc/passwd", "../out-of-bounds", "a/../.."]
)
def test_no_path_leaves_the_folder(folder: Folder, path: str) -> None:
    for act in (folder.full, folder.read, folder.exists, folder.list, folder.delete_folder):
        with pytest.raises(StorageError, match="outside"):
            act(path)
    with pytest.raises(StorageError, match="outside"):
        folder.create(path, b"")


@pytest.mark.parametrize("path", ["", ".", "a", "a/../b", "..a", "a..b/..."])
def test_paths_inside_the_folder_are_taken(folder: Folder, path: str) -> None:
    assert folder.full(path).startswith(folder.root)


def test_folder_is_the_same_after_a_trip_to_another_process(folder: Folder) -> None:
    folder.create("a/b", b"1")
    again = pickle.loads(pickle.dumps(folder))  # noqa: S301 (our own bytes)
    assert (again.url, again.read("a/b")) == (folder.url, b"1")
    assert Folder(f"{again.url}/a").read("b") == b"1"


def test_a_slash_at_its_end_is_not_in_its_name(folder: Folder) -> None:
    assert Folder(f"{folder.url}/").url == folder.url


def test_parquet_is_read_at_any_position(folder: Folder) -> None:
    table = pa.table({"n": range(10_000), "text": [f"row {n}" for n in range(10_000)]})
    with folder.replacing("a.parquet") as sink:
        pq.write_table(table, sink, row_group_size=1000)
    with folder.open("a.parquet") as file:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        assert parquet.read_row_group(7).equals(table.slice(7000, 1000))
        assert parquet.read().equals(table)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a.parquet", "b.parquet", "sub/c.parquet", "sub/deep/d.parquet"]),
        ("/", ["a.parquet", "b.parquet", "sub/c.parquet", "sub/deep/d.parquet"]),
        ("/a.parquet", ["a.parquet"]),
        ("/sub", ["c.parquet", "deep/d.parquet"]),
        ("/sub/c.parquet", ["c.parquet"]),
        ("/*.parquet", ["a.parquet", "b.parquet"]),
        ("/[b-z].parquet", ["b.parquet"]),
        ("/?.parquet", ["a.parquet", "b.parquet"]),
        ("/sub/*", ["c.parquet"]),
        ("/s*/c.parquet", ["sub/c.parquet"]),
        ("/**/*.parquet", ["a.parquet", "b.parquet", "sub/c.parquet", "sub/deep/d.parquet"]),
    ],
)
def test_files_are_found_and_hidden_ones_skipped(
    folder: Folder, pattern: str, names: list[str]
) -> None:
    put(folder, "b.parquet", "a.parquet", "sub/c.parquet", "sub/deep/d.parquet")
    put(folder, "_SUCCESS", ".a.parquet.crc", "_axbatch/parts/a.parquet/1.parquet", "sub/_x/e")
    put(folder, ".git/f.parquet", "sub/.hidden.parquet")
    assert found(folder.url + pattern) == names
    root, entries = find_files(folder.url + pattern)
    assert all(root.read(entry.path).decode().endswith(entry.path) for entry in entries)


@pytest.mark.s3
@pytest.mark.parametrize("pattern", ["", "/", "/sub", "/sub/", "/**", "/*"])
def test_object_that_stands_for_a_folder_is_no_file(s3_url: str, pattern: str) -> None:
    folder = Folder(f"{s3_url}/{uuid.uuid4().hex}")
    put(folder, "sub/c.parquet")
    for name in ("", "sub", "empty"):
        folder.filesystem.pipe_file(f"{folder.full(name)}/", b"")
    assert [entry.path for entry in folder.list()] == ["sub/c.parquet"]
    if pattern != "/*":
        assert [path[-9:] for path in found(folder.url + pattern)] == ["c.parquet"]
    else:
        with pytest.raises(InputError):
            found(folder.url + pattern)


@pytest.mark.parametrize("pattern", ["", "/*", "/*.parquet", "/b.parquet"])
def test_link_is_the_file_that_it_leads_to(tmp_path: Path, pattern: str) -> None:
    """As in the folders that huggingface_hub downloads to."""
    (tmp_path / "blob").write_bytes(b"rows")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/b.parquet").symlink_to(tmp_path / "blob")
    os.utime(tmp_path / "in/b.parquet", (1, 1), follow_symlinks=False)
    root, entries = find_files(f"{tmp_path}/in{pattern}")
    assert entries == [root.entry("b.parquet")]
    assert (entries[0].size, root.read("b.parquet")) == (4, b"rows")


@pytest.mark.parametrize("target", ["folder", "nothing", "in/b"])
@pytest.mark.parametrize("pattern", ["", "/*"])
def test_link_to_no_file_is_refused_and_named(tmp_path: Path, target: str, pattern: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.parquet").touch()
    (tmp_path / "in/b").symlink_to(tmp_path / target)
    with pytest.raises(InputError, match="in/b: is no file"):
        find_files(f"{tmp_path}/in{pattern}")


def test_folder_that_cannot_be_listed_is_an_error_and_one_that_is_gone_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced, as root may list any."""
    for name in ("in/2024/a.parquet", "in/2025/b.parquet"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    errors: dict[str, OSError] = {}
    ls = LocalFileSystem.ls

    def failing(self: LocalFileSystem, path: str, detail: bool = False) -> Any:
        if error := errors.get(Path(path).name):
            raise error
        return ls(self, path, detail)

    monkeypatch.setattr(LocalFileSystem, "ls", failing)
    errors["2025"] = FileNotFoundError()
    assert found(f"{tmp_path}/in") == ["2024/a.parquet"]
    for name in (".Trash-0", "lost+found"):  # as a disk's root has them
        (tmp_path / "in" / name).mkdir()
        errors[name] = PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}/in/{name}")
    assert found(f"{tmp_path}/in") == ["2024/a.parquet"]
    errors["2025"] = PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}/in/2025")
    for url in (f"{tmp_path}/in", f"{tmp_path}/in/*/*"):
        with pytest.raises(StorageError, match="access denied"):
            find_files(url)
    with pytest.raises(StorageError, match="access denied"):
        Folder(str(tmp_path)).list()


def test_file_in_a_hidden_folder_is_found_by_its_path(folder: Folder) -> None:
    put(folder, "_data/a.parquet")
    assert found(f"{folder.url}/_data") == found(f"{folder.url}/_data/*.parquet") == ["a.parquet"]


@pytest.mark.parametrize("path", ["/none", "/none/*.parquet", "/*.csv", "/none.parquet", "/hidden"])
def test_nothing_found_is_an_input_error_that_names_the_path(folder: Folder, path: str) -> None:
    put(folder, "a.parquet", "hidden/_b.parquet", "hidden/.c.parquet")
    with pytest.raises(InputError) as raised:
        find_files(folder.url + path)
    assert folder.url + path in str(raised.value)


def test_empty_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        find_files(str(tmp_path))


def test_file_with_brackets_in_its_name_is_found_by_its_path(folder: Folder) -> None:
    put(folder, "news [1].parquet")
    assert found(f"{folder.url}/news [1].parquet") == ["news [1].parquet"]


@pytest.mark.parametrize("url", ["nosuch://a/b", "gopher://a"])
def test_unknown_kind_of_url_is_an_error_that_names_it(url: str) -> None:
    with pytest.raises(AxbatchError, match=url):
        Folder(url)
    with pytest.raises(AxbatchError, match=url):
        find_files(url)


@pytest.mark.parametrize("url", ["out", "./out", "../there/out"])
def test_relative_folder_lies_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    assert Folder(url).create("a/b", b"1")
    monkeypatch.chdir("/")
    assert (tmp_path / "there/out/a/b").read_bytes() == b"1"


def test_file_url_is_a_local_folder(tmp_path: Path) -> None:
    folder = Folder(f"file://{tmp_path}")
    assert folder.is_local
    assert folder.create("a", b"1") and not folder.create("a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_no_temporary_file_stays_on_disk(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.create("a", b"1")
    folder.create("a", b"2")
    folder.replace("a", b"3")
    with pytest.raises(ValueError), folder.replacing("b"):
        raise ValueError
    assert [entry.path for entry in folder.list()] == ["a"]


@pytest.mark.s3
@pytest.mark.parametrize(
    "act",
    [lambda folder: folder.create("a", b"1"), lambda folder: folder.replace("a", b"1")],
    ids=["create", "replace"],
)
def test_writing_to_a_missing_bucket_is_an_error_that_names_it(
    s3_url: str, act: Callable[[Folder], Any]
) -> None:
    with pytest.raises(AxbatchError, match="no-such-bucket"):
        act(Folder("s3://no-such-bucket/out"))


@pytest.mark.s3
def test_refused_key_is_a_storage_error_that_says_so(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    PatientS3.clear_instance_cache()
    try:
        folder = Folder(f"{s3_url}/refused")
        for act in (folder.list, lambda: folder.create("a", b"1")):
            with pytest.raises(StorageError, match="access denied"):
                act()
    finally:
        PatientS3.clear_instance_cache()


def test_one_of_many_racing_writers_wins(folder: Folder) -> None:
    assert folder.winners_of_a_race() == 1
    assert not folder.list()


def test_sweep_removes_what_was_left_long_ago_and_nothing_else(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    names = ["_axbatch/tmp/old", "_axbatch/tmp/new", "_axbatch/parts/a/old", "old"]
    for name in names:
        folder.create(name, b"1")
    for name in names:
        if name.endswith("old"):
            os.utime(tmp_path / name, (0, 0))
    folder.sweep([])
    assert {entry.path for entry in folder.list()} == {*names} - {"_axbatch/tmp/old"}


def test_sweep_gives_up_old_uploads_to_s3_and_no_others(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, beside = Folder(f"{s3_url}/sweep"), Folder(f"{s3_url}/sweep-not")
    for each in (folder, beside):
        for name in ("own", "theirs"):
            bucket, key, _ = each.filesystem.split_path(each.full(name))
            each.filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)

    def left() -> int:
        found = folder.filesystem.call_s3("list_multipart_uploads", Bucket=bucket)
        return sum("sweep" in upload["Key"] for upload in found.get("Uploads", ()))

    folder.sweep(["own"])
    assert left() == 4, "they are new"
    monkeypatch.setattr(pipeline.storage, "LEFT_AFTER", timedelta(days=-1))
    folder.sweep(["own"])
    assert left() == 3
