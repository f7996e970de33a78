"""Inputs that are not Parquet, staged to Parquet once, by the `datasets` library.

    <output>/_axbatch/staged/<version>/<name>.parquet      one per source file, or one per dataset

The footer holds the source's fingerprint, and the path its hash: a source that changed is staged
anew, beside what a job may still read, and refused by the plan like any other changed input.
"""

from __future__ import annotations

import hashlib
import posixpath
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.config.data import InputConfig
from pipeline.errors import AxbatchError, InputError
from pipeline.storage import Entry, Folder

STAGED = "_axbatch/staged"
SOURCE_KEY = b"axbatch_source"
BUILDERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".txt": "text"}
"""File suffix -> the builder of `datasets` that reads it."""


def suffix_of(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def staged_name(path: str) -> str:
    """`a/news.jsonl` -> `a/news.parquet`: the name of the staged and of the output file."""
    return posixpath.splitext(path)[0] + ".parquet"


def stage_file(source: Folder, entry: Entry, output: Folder) -> Entry:
    """Stage one JSONL, CSV or text file. Returns the staged file's entry, below `output`, with
    the source's tag. Raises InputError if `datasets` can't read the file."""
    url = f"{source.url}/{entry.path}"
    target = f"{STAGED}/{short_hash(entry.fingerprint)}/{staged_name(entry.path)}"

    def load(cache: str) -> Any:
        import datasets

        builder = BUILDERS[suffix_of(entry.path)]
        # `datasets` takes a name with brackets or stars for a pattern; this one has none.
        copy = Path(cache) / f"source{suffix_of(entry.path)}"
        with source.open(entry.path) as original, copy.open("wb") as plain:
            while piece := original.read(16 << 20):
                plain.write(piece)
        # Words such as NA and None are text to translate, not missing values.
        options = {"keep_default_na": False, "na_values": [""]} if builder == "csv" else {}
        return datasets.load_dataset(
            builder, data_files=str(copy), split="train", cache_dir=cache, **options
        )

    return _stage(output, target, url, entry.fingerprint, load)


def stage_dataset(config: InputConfig, output: Folder) -> Entry:
    """Stage a `datasets` id or dataset folder. Raises InputError if it can't be loaded."""
    assert config.dataset is not None
    name = config.dataset.rstrip("/").rpartition("/")[2]
    # A dataset has no size or time to go by; its full name tells it from others of this one.
    tag = short_hash(repr((config.dataset, config.subset, config.split)))
    target = f"{STAGED}/{tag}/{name}-{config.split}.parquet"

    def load(cache: str) -> Any:
        import datasets

        return datasets.load_dataset(
            config.dataset, config.subset, split=config.split, cache_dir=cache
        )

    return _stage(output, target, f"dataset {config.dataset}", f"0:{tag}", load)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stage(
    output: Folder, target: str, what: str, fingerprint: str, load: Callable[[str], Any]
) -> Entry:
    def write(cache: str, path: Path) -> None:
        _write_parquet(load, cache, path, what, fingerprint)

    return stage_once(output, target, fingerprint, write)


def stage_once(
    output: Folder, target: str, fingerprint: str, write: Callable[[str, Path], None]
) -> Entry:
    """The staged file `target` below `output`. If it isn't there yet, or was made from something
    else, `write` makes it first, given a temporary folder and a path in it: a Parquet file with
    `fingerprint` under SOURCE_KEY in its footer."""
    staged = _staged_entry(output, target)
    if staged is None or staged.fingerprint != fingerprint:
        with tempfile.TemporaryDirectory(prefix="axbatch-staging-") as cache:
            local = Path(cache) / "staged.parquet"
            write(cache, local)
            with local.open("rb") as file, output.replacing(target) as sink:
                while piece := file.read(16 << 20):
                    sink.write(piece)
        staged = _staged_entry(output, target)
        assert staged is not None
    return staged


def _staged_entry(output: Folder, target: str) -> Entry | None:
    """The staged file under the fingerprint of what it was made from."""
    if not output.exists(target):
        return None
    with output.open(target) as file:
        made_from = (pq.read_metadata(file).metadata or {})[SOURCE_KEY].decode()
    size, _, tag = made_from.partition(":")
    return Entry(target, int(size), tag)


def _write_parquet(
    load: Callable[[str], Any], cache: str, path: Path, what: str, fingerprint: str
) -> None:
    from datasets.exceptions import DatasetGenerationError

    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # progress bars
            dataset = load(cache)
    except AxbatchError:
        raise
    except StopIteration as error:
        raise InputError(f"{what}: is empty", "Remove it, or narrow `input.path`.") from error
    except (DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        text = " ".join(str(cause).split())[:200]
        raise InputError(
            f"{what}: `datasets` cannot read it: {text}", "Mend the file or the name."
        ) from error
    schema = dataset.data.schema.remove_metadata()
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for batch in dataset.with_format("arrow").iter(batch_size=10_000):
            writer.write_table(batch.cast(schema))
        writer.add_key_value_metadata({SOURCE_KEY: fingerprint.encode()})
