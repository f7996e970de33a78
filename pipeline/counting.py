"""Counting texts: characters of all, tokens and scripts of as many as cost next to nothing.

A model's tokenizer reads about 2 MB/s on one core, a baseline's about 15 (A.X's and o200k, seen on
the development machine): beside a GPU that is nothing, beside a small model it is more than the 1%
that accounting may take. So each worker keeps to that share, and counts rows evenly spaced; unless
every row's own counts are wanted (`accounting.rows`), which take what they take.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

from pipeline.accounting import RowTexts, Sample, Script, TextCounts, TextSize
from pipeline.config.costs import AccountingConfig
from pipeline.errors import JobFileError

CountTokens = Callable[[str], int]

BASELINES = ("o200k_base", "cl100k_base")
"""Whose ranks come with the package bpe-openai (MIT): no network is needed."""

WHAT_IT_IS = (
    f"Give a folder with a tokenizer.json, or a hub id; as baseline also {' or '.join(BASELINES)}."
)

BUDGET = 0.01
"""Share of one core's time that counting may take."""
SHORT = 2_000
"""Characters, which take a millisecond or so."""
LEARNING_ROWS = 8
"""Counted before it is known what a row takes."""
LEARNING_CHARACTERS = 200_000
"""Of these rows, most that are counted at once, and as many more in each minute: some tenths of a
second, in which none of the worker's units can be committed."""

# Runs of letters by script, for Python's `re`, which knows no \p{Hangul}: jamo, compatibility jamo,
# syllables, extended jamo; Latin letters with those of the European languages.
HANGUL = re.compile(r"[\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb]+")
LATIN = re.compile(r"[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff]+")


def load_baseline(name: str) -> CountTokens:
    """The counter of `accounting.baseline`: o200k_base, cl100k_base, or a tokenizer's folder.

    Raises JobFileError if it is none of these.
    """
    if name in BASELINES:
        from bpe_openai import get_encoding

        encode = get_encoding(name).encode_ordinary
        return lambda text: len(encode(text))
    near = get_close_matches(name, BASELINES, 1)
    if near and not Path(name).exists():
        raise JobFileError(f"accounting.baseline: {name}: unknown", f"Did you mean `{near[0]}`?")
    return load_tokenizer(name, "accounting.baseline")


def load_tokenizer(source: str, key: str = "model.id", revision: str | None = None) -> CountTokens:
    """The counter of a folder's, or a hub id's, tokenizer.json; without special tokens around.
    `key` is the job file's that names it, `revision` the hub id's.

    Raises JobFileError if there is none.
    """
    from tokenizers import Tokenizer

    path = _tokenizer_file(source, key, revision)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # of this very type, for whatever is wrong with the file
        reason = " ".join(str(error).split())[:160]
        raise JobFileError(f"{key}: {path} is no tokenizer: {reason}", WHAT_IT_IS) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # in a row they are text, see RowText
    return counter_of(tokenizer)


def counter_of(tokenizer: Any) -> CountTokens:
    """Counts with a `tokenizers.Tokenizer`. A batch is counted without the GIL, so an event loop
    runs on beside a long text; but in other threads, whose wakening takes a busy machine longer
    than a short text does."""

    def count(text: str) -> int:
        if len(text) < SHORT:
            return len(tokenizer.encode(text, add_special_tokens=False))
        return len(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])

    return count


def _tokenizer_file(source: str, key: str, revision: str | None) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir() or source.startswith(("/", ".", "~")):
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise JobFileError(f"{key}: {source} holds no tokenizer.json", WHAT_IT_IS)
        return file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(source, "tokenizer.json", revision=revision))
    except (OSError, HFValidationError) as error:
        raise JobFileError(
            f"{key}: `{source}` is no local folder, and no tokenizer.json of that id can be had "
            f"({type(error).__name__})",
            WHAT_IT_IS,
        ) from None


def check_accounting(accounting: AccountingConfig) -> None:
    """See on the driver's machine what its workers will load. Raises JobFileError, ModelError."""
    if accounting.baseline and accounting.baseline not in BASELINES:
        load_baseline(accounting.baseline)
    if accounting.tokenizer:
        load_tokenizer(accounting.tokenizer, "accounting.tokenizer")


def texts_in(value: Any) -> Iterator[str]:
    """Every string in a row's value, at any depth; keys are the schema's, not the row's."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def script_of(hangul: int, latin: int) -> Script:
    """The script of most letters of a text; `other` if it has of neither."""
    if not hangul and not latin:
        return "other"
    return "hangul" if hangul >= latin else "latin"


class TextCounter:
    """Counts the texts of units, within its budget. From one thread at a time."""

    def __init__(
        self,
        model: CountTokens | None,
        baseline: CountTokens | None,
        sample: Literal["auto"] | float,
        clock: Callable[[], float] = time.monotonic,
        work_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """`sample` as in `accounting.sample`. `clock` is the time that passes, `work_clock` that
        which this thread works."""
        self._model = model
        self._baseline = baseline
        self._sample = 0.0 if model is None and baseline is None else sample
        self._clock, self._work_clock = clock, work_clock
        self._began = clock()
        self._spent = 0.0
        self._counted = 0
        self._learned = 0
        """Characters of the first rows."""

    def count(self, columns: Mapping[str, Sequence[Any]], offset: int = 0) -> dict[str, TextCounts]:
        """The texts of a unit: by column its rows' values, which are as many in each. `offset` is
        the number of the unit's first row: that decides which rows are counted, if not all."""
        counts = {
            column: TextCounts(
                sum(value is not None for value in values),
                sum(len(text) for value in values for text in texts_in(value)),
            )
            for column, values in columns.items()
        }
        rows = max(map(len, columns.values()), default=0)
        began = self._work_clock()
        for row in self._chosen(rows, offset):
            if self._is_learning and not self._may_learn([v[row] for v in columns.values()]):
                continue
            self._counted += 1
            for column, values in columns.items():
                if values[row] is not None:
                    self._count_value(values[row], counts[column])
        self._spent += self._work_clock() - began
        return counts

    def count_rows(
        self, columns: Mapping[str, Sequence[Any]], output: str
    ) -> tuple[dict[str, TextCounts], list[RowTexts]]:
        """As `count`, but of every row, whatever the budget; and what each row adds. `output` is
        the result's column, the others are the input's."""
        counts = {column: TextCounts() for column in columns}

        def size_of(column: str, row: int) -> TextSize | None:
            value = columns[column][row]
            if value is None:
                return None
            size = self._count_value(value, counts[column])
            counts[column].texts += 1
            counts[column].characters += size.characters
            return size

        rows = []
        for row in range(len(columns[output])):
            sizes = [size_of(column, row) for column in columns if column != output]
            given = [size for size in sizes if size]
            rows.append(RowTexts(reduce(add, given) if given else None, size_of(output, row)))
        return counts, rows

    def _chosen(self, rows: int, offset: int) -> Iterable[int]:
        """The rows of a unit that are to be counted, evenly spaced over those of all units."""
        if self._sample != "auto":
            counted, of = Fraction(str(self._sample)).as_integer_ratio()
            return (row for row in range(rows) if (offset + row) * counted % of < counted)
        step = self._step(rows)
        return range(-offset % step, rows, step) if step else ()

    @property
    def _is_learning(self) -> bool:
        return self._sample == "auto" and self._counted < LEARNING_ROWS

    def _may_learn(self, row: Sequence[Any]) -> bool:
        """Whether that is soon done, as nothing else is known; `row` is a value of each column."""
        minutes = (self._clock() - self._began) / 60
        learned = self._learned + sum(map(len, texts_in(row)))
        if learned > LEARNING_CHARACTERS * (1 + minutes):
            return False
        self._learned = learned
        return True

    def _step(self, rows: int) -> int:
        """With `auto`, every how many rows one is counted; 0 for none."""
        if self._is_learning:
            return max(1, rows // LEARNING_ROWS)
        left = BUDGET * (self._clock() - self._began) - self._spent
        affordable = int(left * self._counted / max(self._spent, 1e-9))
        if affordable < 1:
            return 0
        return -(-rows // affordable) if affordable < rows else 1

    def _count_value(self, value: Any, counts: TextCounts) -> TextSize:
        characters = hangul = latin = model = baseline = 0
        for text in texts_in(value):
            characters += len(text)
            hangul += sum(map(len, HANGUL.findall(text)))
            latin += sum(map(len, LATIN.findall(text)))
            model += self._model(text) if self._model else 0
            baseline += self._baseline(text) if self._baseline else 0
        sample = counts.samples.setdefault(script_of(hangul, latin), Sample())
        sample.count(characters, hangul, latin, model, baseline)
        return TextSize(
            characters, model if self._model else None, baseline if self._baseline else None
        )
