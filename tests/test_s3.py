"""S3 that falters: no fault loses, doubles or halves a file, and a dead address is no long wait."""

import pickle
import random
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import IO, Any

import pytest

import pipeline.s3
import pipeline.storage
from pipeline.errors import StorageError
from pipeline.s3 import PatientS3
from pipeline.storage import Folder, find_files
from tests.s3_store import FAULTS, FAULTS_OF_WRITES, REFUSALS, Store, serving

PIECE = 5 << 20
"""The least that S3 takes as a piece of an upload, but for the last."""
CONTENT = b"".join(n.to_bytes(4, "big") for n in range((2 * PIECE + 1000) // 4))
"""Three pieces, if it is written bit by bit."""


def write_bit_by_bit(sink: IO[bytes]) -> None:
    for start in range(0, len(CONTENT), PIECE // 4):
        sink.write(CONTENT[start : start + PIECE // 4])


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The longest that each wait might have been, in seconds; none takes any time."""
    longest: list[float] = []

    def wait(_: float, seconds: float) -> float:
        longest.append(seconds)
        return 0.0

    monkeypatch.setattr(pipeline.s3.random, "uniform", wait)
    return longest


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[Callable[..., None]]:
    """Points S3 at an address that has not answered yet."""

    def use(url: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        PatientS3.clear_instance_cache()

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(pipeline.storage, "MULTIPART_BYTES", PIECE)
    yield use
    PatientS3.clear_instance_cache()


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For stores that are made later."""
    monkeypatch.setattr(PatientS3, "connect_timeout", 0.2)
    monkeypatch.setattr(PatientS3, "read_timeout", 0.2)
    monkeypatch.setattr(pipeline.s3, "SENDING_S", 0.2)


@pytest.fixture
def store(endpoint: Callable[[str], None]) -> Iterator[Store]:
    with serving(Store()) as server:
        endpoint(server.url)
        yield server


@pytest.fixture
def folder(store: Store) -> Folder:
    """An empty folder of a store that has answered."""
    folder = Folder("s3://bucket/out")
    assert folder.list() == []
    return folder


@pytest.mark.parametrize("fault", [*FAULTS, *FAULTS_OF_WRITES])
def test_first_writer_creates_the_file_and_no_other(
    store: Store, folder: Folder, fault: str
) -> None:
    store.fail(fault, fault, fault)
    assert folder.create("a/b", b"first") is True
    store.fail(fault, fault, fault)
    assert folder.create("a/b", b"second, and longer") is False
    assert folder.read("a/b") == b"first"


def test_silent_store_is_asked_again(short_timeouts: None, store: Store, folder: Folder) -> None:
    store.fail("unanswered", "unanswered")
    store.deaf_to = 2
    assert folder.create("a", b"first") is True
    store.fail("unanswered")
    store.deaf_to = 1
    assert folder.create("a", b"second, and longer") is False
    store.fail("unanswered")
    assert folder.read("a") == b"first"
    store.fail("unanswered")
    assert [entry.path for entry in folder.list()] == ["a"]


def test_one_of_many_racing_writers_wins_though_answers_are_lost(
    store: Store, folder: Folder
) -> None:
    chance = random.Random(0)
    for race in range(10):
        store.fail(*chance.choices([None, "lost answer", "closed", "SlowDown"], k=40))
        contents = [f"writer {n}".encode() for n in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(folder.create, repeat(str(race)), contents))
        assert won.count(True) == 1
        assert folder.read(str(race)) == contents[won.index(True)]


def test_file_that_was_taken_and_deleted_is_another_ones(store: Store, folder: Folder) -> None:
    store.fail("PreconditionFailed")
    assert folder.create("a", b"1") is False


def test_file_is_created_in_one_request(store: Store, folder: Folder) -> None:
    store.fail()
    assert folder.create("a", CONTENT)
    assert store.asked == ["PUT out/a"]


@pytest.mark.parametrize("fault", FAULTS)
def test_listing_is_whole_though_its_pages_fail(store: Store, folder: Folder, fault: str) -> None:
    names = ["a", "b/c", "b/d", "e", "f"]
    for name in names:
        folder.create(name, b"1")
    store.fail(fault, fault, None, fault, fault)
    assert [entry.path for entry in folder.list()] == names


@pytest.mark.parametrize("fault", [*FAULTS, "half"])
def test_content_is_read_whole(store: Store, folder: Folder, fault: str) -> None:
    folder.create("a", CONTENT)
    store.fail(*[fault] * 4)
    assert folder.read("a") == CONTENT
    store.fail(*[fault] * 4)
    with folder.open("a") as file:
        assert file.read_at(1000, PIECE) == CONTENT[PIECE : PIECE + 1000]
    store.fail(fault, fault)
    assert [entry.path for entry in find_files("s3://bucket/out/a")[1]] == ["a"]


@pytest.mark.parametrize("fault", ["InternalError", "closed", "lost answer"])
@pytest.mark.parametrize("request_number", range(5))
def test_upload_in_pieces_arrives_whole(
    store: Store, folder: Folder, request_number: int, fault: str
) -> None:
    folder.create("a", b"old")
    store.fail(*[None] * request_number, fault, fault)
    with folder.replacing("a") as sink:
        write_bit_by_bit(sink)
    assert len(store.asked) == 5 + 2 + (fault == "lost answer" and request_number == 4)
    assert folder.read("a") == CONTENT
    # The id of an upload is in the answer; without it, nobody can end it.
    lost = 2 if (request_number, fault) == (0, "lost answer") else 0
    assert len(store.uploads) == lost


def test_late_error_of_an_upload_is_a_fault(store: Store, folder: Folder) -> None:
    store.fail(None, None, None, None, "late")
    with folder.replacing("a") as sink:
        write_bit_by_bit(sink)
    assert folder.read("a") == CONTENT


def test_upload_that_someone_else_ended_is_an_error(store: Store, folder: Folder) -> None:
    folder.create("a", b"old")
    with pytest.raises(StorageError, match="someone else"), folder.replacing("a") as sink:
        write_bit_by_bit(sink)
        assert store.uploads
        store.uploads.clear()
    assert folder.read("a") == b"old"


@pytest.mark.parametrize("fault", ["SlowDown", "lost answer"])
def test_pieces_are_given_up_if_writing_fails(store: Store, folder: Folder, fault: str) -> None:
    with pytest.raises(ValueError, match="bug"), folder.replacing("a") as sink:
        write_bit_by_bit(sink)
        assert store.uploads
        store.fail(fault, fault)
        raise ValueError("bug")
    assert (store.uploads, store.objects) == ({}, {})


SOME = [lambda sink: None, lambda sink: sink.write(b"1"), write_bit_by_bit]
"""Ways to write nothing, little, and three pieces."""


@pytest.mark.parametrize("write", SOME, ids=["nothing", "little", "pieces"])
def test_nothing_appears_if_giving_up_fails_too(
    store: Store,
    folder: Folder,
    write: Callable[[IO[bytes]], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline.s3, "FIRST_ANSWER_S", 0.0)  # all that giving up is waited for
    with pytest.raises((ValueError, StorageError)), folder.replacing("a") as sink:
        write(sink)
        store.fail("SlowDown", "SlowDown")
        raise ValueError("bug")
    assert sink.closed  # so its finaliser has nothing left to do
    assert len(store.asked) <= 1
    assert store.objects == {}


@pytest.mark.parametrize("write", SOME, ids=["nothing", "little", "pieces"])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_appears_if_the_block_closes_its_file(
    store: Store, folder: Folder, write: Callable[[IO[bytes]], Any], fails: bool
) -> None:
    with pytest.raises(ValueError), folder.replacing("a") as sink:
        write(sink)
        sink.close()
        if fails:
            raise ValueError
    assert (store.uploads, store.objects) == ({}, {})


@pytest.mark.parametrize("size", [0, 1, PIECE - 1])
def test_small_file_is_replaced_in_one_request(store: Store, folder: Folder, size: int) -> None:
    folder.create("a", b"old")
    store.fail()
    folder.replace("a", CONTENT[:size])
    assert store.asked == ["PUT out/a"]
    store.fail("lost answer", "InternalError")
    folder.replace("a", CONTENT[:size])
    assert folder.read("a") == CONTENT[:size]


@pytest.mark.parametrize("code", REFUSALS)
def test_refusal_is_an_error_at_once(store: Store, folder: Folder, code: str) -> None:
    for act in (folder.list, lambda: folder.create("a", b"1"), lambda: folder.replace("a", b"1")):
        store.fail(code)
        with pytest.raises(StorageError):
            act()
        assert len(store.asked) == 1


def test_missing_file_is_missing_at_once(store: Store, folder: Folder, waits: list[float]) -> None:
    with pytest.raises(FileNotFoundError):
        folder.read("a")
    assert not folder.exists("a")
    assert waits == []


def test_waits_grow_to_half_a_minute(store: Store, folder: Folder, waits: list[float]) -> None:
    store.fail(*["SlowDown"] * 9)
    folder.list()
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


AT_MOST = {**dict.fromkeys(FAULTS, 1), "closed": 2, "lost answer": 2}
"""Requests in one attempt: after a broken connection, aiohttp asks once more by itself."""


@pytest.mark.parametrize(
    ("fault", "hint"), [("SlowDown", "run the same command again"), ("closed", "the network")]
)
def test_error_after_all_patience_says_what_to_do(
    store: Store, folder: Folder, fault: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.s3, "PATIENCE_S", 0.0)
    store.fail(*[fault] * 9)
    with pytest.raises(StorageError, match=hint):
        folder.list()
    assert len(store.asked) <= AT_MOST[fault]


@pytest.mark.parametrize("fault", FAULTS)
def test_first_contact_has_little_patience(
    store: Store, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.s3, "FIRST_ANSWER_S", 0.0)
    store.fail(*[fault] * 9)
    with pytest.raises(StorageError):
        find_files("s3://bucket/in")
    assert len(store.asked) <= AT_MOST[fault]


def test_refusal_is_an_answer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.s3, "FIRST_ANSWER_S", 0.0)
    folder = Folder("s3://bucket/out")
    store.fail("AccessDenied", "closed", "closed")
    with pytest.raises(StorageError):
        folder.list()
    assert folder.list() == []


@pytest.mark.parametrize(
    "way", ["nobody listens", "nobody accepts", "nobody answers", "no such host"]
)
def test_dead_address_is_an_error_that_asks_for_the_right_one(
    short_timeouts: None,
    endpoint: Callable[[str], None],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline.s3, "FIRST_ANSWER_S", 0.0)
    with socket.socket() as server, socket.socket() as first:
        server.bind(("127.0.0.1", 0))
        host, port = server.getsockname()
        if way == "nobody accepts":
            server.listen(0)
            first.connect((host, port))  # fills the queue: the kernel drops all that come later
        elif way == "nobody answers":
            server.listen()
        endpoint(f"http://{'nowhere.invalid' if way == 'no such host' else host}:{port}")
        folder = Folder("s3://bucket/out")
        for act in (folder.list, lambda: folder.read("a"), lambda: find_files(folder.url)):
            with pytest.raises(StorageError, match="AWS_ENDPOINT_URL"):
                act()


def test_patience_travels_to_other_processes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.s3, "FIRST_ANSWER_S", 0.0)

    def list_elsewhere(folder: Folder) -> None:
        data = pickle.dumps(folder)
        PatientS3.clear_instance_cache()
        store.fail("SlowDown")
        pickle.loads(data).list()  # noqa: S301 (our own bytes)

    folder = Folder("s3://bucket/out")
    with pytest.raises(StorageError):
        list_elsewhere(folder)
    folder.list()
    list_elsewhere(folder)


def test_log_is_told_once_that_a_request_waits(
    store: Store, folder: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    store.fail(*["SlowDown"] * 5)
    folder.create("a", b"text of a row")
    store.fail(*["closed"] * 3)
    folder.read("a")
    out, err = capfd.readouterr()
    assert out == ""  # which may be a command's JSON
    first, second = err.splitlines()
    assert first == "axbatch: S3: SlowDown; trying again for 600 s"
    assert store.url in second
    assert not re.search("text of a row|a secret", err)


@pytest.fixture
def lose_answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The next answer to a request of this kind does not arrive."""
    ask, lost = PatientS3._ask, []

    async def falter(self: PatientS3, method: str, *defaults: Any, **arguments: Any) -> Any:
        answer = await ask(self, method, *defaults, **arguments)
        if method in lost:
            lost.remove(method)
            raise ConnectionResetError
        return answer

    monkeypatch.setattr(PatientS3, "_ask", falter)
    return lost.append


@pytest.fixture
def real_folder(s3_url: str, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Folder:
    """An empty folder on a real S3 server that has answered."""
    monkeypatch.setattr(pipeline.storage, "MULTIPART_BYTES", PIECE)
    folder = Folder(f"{s3_url}/{uuid.uuid4().hex}")
    assert folder.list() == []
    return folder


@pytest.mark.s3
def test_real_store_knows_its_writers(
    real_folder: Folder, lose_answer: Callable[[str], None]
) -> None:
    lose_answer("put_object")
    assert real_folder.create("a", b"first") is True
    lose_answer("put_object")
    lose_answer("head_object")
    assert real_folder.create("a", b"second, and longer") is False
    assert real_folder.read("a") == b"first"


@pytest.mark.s3
@pytest.mark.parametrize("lost", ["upload_part", "complete_multipart_upload", "head_object"])
def test_real_store_takes_an_upload_in_pieces(
    real_folder: Folder, lose_answer: Callable[[str], None], lost: str
) -> None:
    lose_answer("complete_multipart_upload")
    lose_answer(lost)
    with real_folder.replacing("a") as sink:
        write_bit_by_bit(sink)
    assert real_folder.read("a") == CONTENT
    assert open_uploads(real_folder) == []


@pytest.mark.s3
def test_real_store_keeps_no_pieces_if_writing_fails(
    real_folder: Folder, lose_answer: Callable[[str], None]
) -> None:
    with pytest.raises(ValueError, match="bug"), real_folder.replacing("a") as sink:
        write_bit_by_bit(sink)
        assert len(open_uploads(real_folder)) == 1
        lose_answer("abort_multipart_upload")
        raise ValueError("bug")
    assert open_uploads(real_folder) == []
    assert real_folder.list() == []


def open_uploads(folder: Folder) -> list[str]:
    bucket, prefix, _ = folder.filesystem.split_path(folder.root)
    listed = folder.filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
    return [upload["Key"] for upload in listed.get("Uploads", [])]
