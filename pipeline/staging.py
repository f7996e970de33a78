"""Inputs that are not Parquet, staged to Parquet once.

    <output>/_axbatch/staged/<version>/<name>.parquet      one per source file, or one per dataset

The footer holds the source's fingerprint, and the path its hash: a source that changed is staged
anew, beside what a job may still read, and refused by the plan like any other changed input.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.data import InputConfig
from pipeline.errors import InputError, JobFileError, NoSuchFileError
from pipeline.filesystems import absolute_url, storage_errors
from pipeline.parquet import parquet_writer
from pipeline.plain_files import KINDS, convert
from pipeline.storage import Entry, Folder

STAGED = "_axbatch/staged"
SOURCE_KEY = b"axbatch_source"


def suffix_of(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def staged_name(path: str) -> str:
    """`a/news.jsonl` -> `a/news.parquet`: the name of the staged and of the output file."""
    return posixpath.splitext(path)[0] + ".parquet"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stage_file(source: Folder, entry: Entry, output: Folder, staged: Collection[str] = ()) -> Entry:
    """Stage one JSON, CSV or text file, unless it is among those that are `staged`. Returns the
    staged file's entry, below `output`, with the source's tag. Memory: a row group, or the longest
    row.

    Raises InputError if the file can't be read, or holds what Parquet has no type for.
    """
    url = f"{source.url}/{entry.path}"
    kind = KINDS[suffix_of(entry.path)]
    fingerprint = f"{entry.fingerprint}:{kind}"  # of another kind, the same bytes are other rows
    target = f"{STAGED}/{short_hash(fingerprint)}/{staged_name(entry.path)}"

    def write(cache: str, path: Path) -> None:
        copy = Path(cache) / "source"  # it is read twice
        with copy.open("wb") as plain:
            plain.writelines(_pieces(source, entry.path))
        convert(copy, kind, url, path, {SOURCE_KEY: fingerprint.encode()})

    return stage_once(output, target, fingerprint, write, staged)


def stage_dataset(config: InputConfig, output: Folder) -> Entry:
    """Stage a `datasets` id or a dataset folder. Raises InputError if it can't be loaded."""
    assert config.dataset is not None
    folder = absolute_url(config.dataset)
    is_local = Path(folder).is_dir()
    if is_local and output.is_local and _is_below(output.url, folder):
        raise InputError(
            f"output.path {output.url} lies inside the dataset folder {folder}",
            "The next run would read its own output; put `output.path` beside the folder.",
        )
    place = folder if is_local else config.dataset
    # A hub's dataset has no size or time to go by; its full name tells it from others of this one.
    tag = short_hash(
        repr((place, config.subset, config.split, *([_files_of(folder)] if is_local else [])))
    )
    name = place.rstrip("/").rpartition("/")[2]
    target = f"{STAGED}/{tag}/{name}-{config.split}.parquet"

    def write(cache: str, path: Path) -> None:
        _write_dataset(config, place, cache, path, f"0:{tag}")

    return stage_once(output, target, f"0:{tag}", write)


def _is_below(path: str, folder: str) -> bool:
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def _files_of(folder: str) -> list[tuple[str, int, str]]:
    """Path, size and time of all files but hidden ones, which `datasets` doesn't read either."""
    entries = Folder(folder).list()
    return [(e.path, e.size, e.tag) for e in entries if "/." not in f"/{e.path}"]


def stage_once(
    output: Folder,
    target: str,
    fingerprint: str,
    write: Callable[[str, Path], None],
    staged: Collection[str] = (),
) -> Entry:
    """The staged file `target` below `output`. If it isn't there yet, or was made from something
    else, `write` makes it first, given a temporary folder and a path in it: a Parquet file with
    `fingerprint` under SOURCE_KEY in its footer. Of those in `staged` it is known already, as their
    paths hold its hash.

    Raises StorageError if the disk is full, here or below `output`.
    """
    if target in staged:
        return _entry(target, fingerprint)
    found = _staged_entry(output, target)
    if found is None or found.fingerprint != fingerprint:
        with (
            storage_errors(f"{tempfile.gettempdir()} (where {target} is made)"),
            tempfile.TemporaryDirectory(prefix="axbatch-staging-") as cache,
        ):
            local = Path(cache) / "staged.parquet"
            write(cache, local)
            with local.open("rb") as file, output.replacing(target) as sink:
                while piece := file.read(16 << 20):
                    sink.write(piece)
        found = _staged_entry(output, target)
        assert found is not None
    return found


def _staged_entry(output: Folder, target: str) -> Entry | None:
    """The staged file under the fingerprint of what it was made from."""
    if not output.exists(target):
        return None
    with output.open(target) as file:
        made_from = (pq.read_metadata(file).metadata or {})[SOURCE_KEY].decode()
    return _entry(target, made_from)


def _entry(target: str, made_from: str) -> Entry:
    size, _, tag = made_from.partition(":")
    return Entry(target, int(size), tag)


def _pieces(source: Folder, path: str) -> Iterator[bytes]:
    url = f"{source.url}/{path}"
    try:
        with storage_errors(url), source.open(path) as file:
            while piece := file.read(16 << 20):
                yield piece
    except FileNotFoundError as error:
        raise NoSuchFileError(f"{url}: no such file") from error


def _write_dataset(
    config: InputConfig, place: str, cache: str, path: Path, fingerprint: str
) -> None:
    what = f"dataset {config.dataset}"
    with _dataset_errors(what):
        import datasets

        builder = datasets.load_dataset_builder(place, config.subset, cache_dir=cache)
        if hasattr(builder.config, "on_mixed_types"):
            # By default one number among the texts makes JSON, quotes and all, of every text.
            builder.config.on_mixed_types = None
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=config.split)
    schema = dataset.data.schema.remove_metadata()
    with path.open("wb") as sink, parquet_writer(sink, schema) as writer:
        for batch in dataset.with_format("arrow").iter(batch_size=10_000):
            writer.write_table(batch.cast(schema))
        writer.add_key_value_metadata({SOURCE_KEY: fingerprint.encode()})


@contextmanager
def _dataset_errors(what: str) -> Iterator[None]:
    """Turn what `datasets` raises into errors that say what to do, and quote no row."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        with (
            storage_errors(what),
            redirect_stdout(StringIO()),  # progress bars
            redirect_stderr(StringIO()),
        ):
            yield
    except (DatasetGenerationError, pa.ArrowException) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            with storage_errors(what):
                raise cause from error
        raise InputError(
            f"{what}: `datasets` cannot read its rows: {_without_rows(cause)}",
            "Mend its files, or convert them to Parquet and name those in `input.path`. `-v` shows "
            "the whole error, which may quote a row.",
        ) from error
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{what}: `datasets` cannot load it: {text or type(error).__name__}",
            "Check `input.dataset`, `input.subset` and `input.split`, and the dataset's card.",
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise JobFileError(
            f"{what}: is made by a script, and `datasets` runs none",
            "Name one that consists of files, or convert it to Parquet and name that in "
            "`input.path`.",
        ) from error


def _without_rows(error: BaseException) -> str:
    """What is wrong, without the text of a row, which most messages quote."""
    from datasets.table import CastError

    text = " ".join(str(error).split())
    if isinstance(error, CastError):  # names columns and their types
        return text[:200]
    changed = re.search(r"Column\(.*\) changed from \w+ to \w+", text)
    return changed.group() if changed else type(error).__name__
