"""Long texts in chunks: none over a budget of tokens, cut where it hurts least, nothing lost.

What fits the budget whole is kept whole, from the outside in: sections of Markdown, a heading
with what follows it, lists, tables, code blocks and paragraphs, their parts, sentences, lines,
marks (see markup), words, graphemes, code points. Blocks are found by markdown-it-py, what is
inside of them by segments. Plain text is Markdown with few marks.

The whitespace between chunks is kept apart from them: `split(text, ...).join()` is `text`.
"""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from markdown_it import MarkdownIt

from pipeline.markup import fenced_blocks
from pipeline.segments import CODE_WAYS, LINE_END, PROSE_WAYS, WAYS

Count = Callable[[str], int]
"""Tokens of a text, by the model's own tokenizer."""

Side = Literal["head", "tail"]

LONG = 20_000
"""Characters from which cutting takes more than some ten milliseconds, so a thread does it."""


class Chunk(NamedTuple):
    """A piece of a text. No whitespace at either end, and never empty."""

    text: str
    is_verbatim: bool = False
    """Nothing for a model to rewrite: it lies in one fenced code block, or has no letter or digit
    (a rule, say)."""


class Split(NamedTuple):
    """A text in chunks."""

    chunks: tuple[Chunk, ...]
    separators: tuple[str, ...]
    """Whitespace, often none: before the first chunk, between them, behind the last."""

    def join(self, texts: Sequence[str] | None = None, between: str = "") -> str:
        """The text again, or `texts` in the places of its chunks; with `between` where nothing is
        between two chunks of prose."""
        if texts is None:
            texts = [chunk.text for chunk in self.chunks]
        separators = [*self.separators]
        for index, (before, after) in enumerate(pairwise(self.chunks), start=1):
            if not (before.is_verbatim or after.is_verbatim):
                separators[index] = separators[index] or between
        parts = [separators[0]]
        for text, separator in zip(texts, separators[1:], strict=True):
            parts += [text, separator]
        return "".join(parts)


def whole(text: str) -> Split:
    """`text` as it is, in one chunk."""
    first, last = _skip_space(text, 0), len(text.rstrip())
    is_code = any(start <= first and last <= stop for start, stop in fenced_blocks(text))
    return Split((Chunk(text, is_code or not _has_words(text)),), ("", ""))


def _has_words(text: str) -> bool:
    return any(map(str.isalnum, text))


def surely_fits(text: str, budget: int) -> bool:
    """True if `text` can have no more than `budget` tokens, known without counting them.

    A token of a byte-level BPE, as those of A.X, Llama 3, Qwen and GPT are, is a byte at least.
    One that normalises to NFC (A.X 3.1) makes no text longer that is NFC already, as row text is.
    """
    return len(text) <= budget and len(text.encode("utf-8", "replace")) <= budget


def split(text: str, budget: int, count: Count, language: str = "en") -> Split:
    """Cut `text` into chunks of at most `budget` tokens each, by `count`.

    The same text is always cut alike. Two chunks in a row hold more than the budget together,
    give or take what can't be known without counting everything twice. `language` (BCP 47) helps
    with abbreviations. The time is linear in the text's length, about three times that of
    tokenising it.

    Raises ValueError if a single character is over the budget.
    """
    outline = _Outline(text, language, count, budget)
    start = _skip_space(text, 0)
    chunks, separators = [], [text[:start]]
    while start < len(text):
        stop = outline.cut(start)
        chunk = text[start:stop].rstrip()
        stop = start + len(chunk)
        is_verbatim = outline.is_code(start, stop) or not _has_words(chunk)
        chunks.append(Chunk(chunk, is_verbatim))
        start = _skip_space(text, stop)
        separators.append(text[stop:start])
    return Split(tuple(chunks), tuple(separators))


async def split_aside(text: str, budget: int, count: Count, language: str = "en") -> Split:
    """`split` without stalling the event loop: a long text is cut in a thread."""
    if len(text) < LONG:
        return split(text, budget, count, language)
    return await asyncio.to_thread(split, text, budget, count, language)


def keep(side: Side, text: str, budget: int, count: Count, language: str = "en") -> str:
    """The head or the tail of `text`, as much as `budget` tokens hold, cut like a chunk."""
    if side == "head":
        start = _skip_space(text, 0)
        return text[start : _Outline(text, language, count, budget).cut(start)].rstrip()
    # From the end one can only go by small pieces, so up to an eighth of the budget stays unused.
    pieces = split(text, max(budget // 8, 8), count, language)
    kept, start = "", len(text)
    for chunk, space in zip(pieces.chunks[::-1], pieces.separators[:0:-1], strict=True):
        start -= len(space) + len(chunk.text)
        longer = text[start:].rstrip()
        if count(longer) > budget:
            break
        kept = longer
    return kept


def cut_smaller(text: str, language: str = "en") -> Split | None:
    """`text` in smaller chunks, for a model that failed on it: its fenced code blocks apart from
    its prose, or if there are none, two halves, cut between blocks or sentences as near to the
    middle as can be. None if it is a single sentence or a single code block."""
    first, last = _skip_space(text, 0), len(text.rstrip())
    edges = [edge for block in fenced_blocks(text) for edge in block]
    places = [place for place in edges if first < place < last]
    if not places:
        starts = _Outline(text, language).sentence_starts()
        middle = (first + last) / 2
        inside = [place for place in starts if first < place < last]
        places = sorted(inside, key=lambda place: abs(place - middle))[:1]
    return _split_at(text, places) if places else None


def _split_at(text: str, places: Sequence[int]) -> Split:
    """`text` cut at `places`, which are in order; what is whitespace becomes a separator."""
    code = list(fenced_blocks(text))
    chunks, separators, done = [], [""], 0
    for start, stop in pairwise([0, *places, len(text)]):
        chunk = text[start:stop].strip()
        if chunk:
            start = _skip_space(text, start)
            separators[-1] = text[done:start]
            done = start + len(chunk)
            is_code = any(a <= start and done <= b for a, b in code)
            chunks.append(Chunk(chunk, is_code or not _has_words(chunk)))
            separators.append("")
    separators[-1] = text[done:]
    return Split(tuple(chunks), tuple(separators))


class _Outline:
    """Where a text may be cut, from the coarsest way to the finest.

    A way is the sorted starts of the segments that it divides the text into.
    """

    def __init__(self, text: str, language: str, count: Count = len, budget: int = 1) -> None:
        self._text = text
        self._language = language
        self._count = count
        self._budget = budget
        self._blocks, self._heading_before = _blocks_of(text)
        self._code = list(fenced_blocks(text))
        self._code_starts = [start for start, _ in self._code]
        self._starts_within: dict[tuple[str, int, int], list[int]] = {}
        self._tokens_of: dict[tuple[int, int], int] = {}

    @cached_property
    def _scale(self) -> _Scale:
        return _Scale(self._text, self._count, min(max(self._budget, 16), 200))

    def cut(self, start: int) -> int:
        """Where the chunk ends that begins at `start`, which is no whitespace; it may hold
        whitespace at the end, which does not count."""
        budget, limit = self._budget, len(self._text)
        code = self._code_around(start)
        if code and not self._fits(*code):
            limit = code[1]  # what is left of a code block is apart from the prose behind it
        room = budget + budget // 64 + 2  # the scale is not exact
        while True:
            stop = self._boundary(start, min(self._scale.reach(start, room), limit))
            tokens = self._count(self._text[start:stop].rstrip())
            if tokens <= budget:
                return stop
            if stop == start + 1:
                raise ValueError(f"one character has {tokens} tokens, the budget is {budget}")
            limit = stop - 1
            room = min(room - 1, room * budget // tokens)

    def is_code(self, start: int, stop: int) -> bool:
        code = self._code_around(start)
        return code is not None and stop <= code[1]

    def sentence_starts(self) -> list[int]:
        """All starts of blocks and sentences outside of code."""
        blocks = self._blocks[-1]
        starts = set(blocks)
        for start, stop in pairwise([*blocks, len(self._text)]):
            if not self._code_around(start):
                starts.update(self._within("sentences", start, stop))
        return sorted(starts)

    def _boundary(self, start: int, reach: int) -> int:
        """The best place to cut near `reach`, behind `start`: beside the largest segment around it
        that one chunk can hold, or else inside of it."""
        if reach == len(self._text):
            return reach
        around = (0, len(self._text))
        for starts in self._blocks:
            around = _segment_at(starts, reach, (0, len(self._text)))
            if place := self._beside(around, start, reach):
                heading = self._heading_before.get(place, place)
                return heading if heading > start else place
        code = self._code_around(reach)
        if code and code[0] > start:
            return code[0]  # what is over the budget begins with a chunk of its own
        for way in CODE_WAYS if code else PROSE_WAYS:
            around = _segment_at(self._within(way, *around), reach, around)
            if place := self._beside(around, start, reach):
                return place
        return reach

    def _beside(self, segment: tuple[int, int], start: int, reach: int) -> int | None:
        """Where to cut so that `segment`, which holds `reach`, stays whole; None if it can't."""
        if segment[0] == reach:
            return reach
        if segment[0] < start or not self._fits(*segment):
            return None
        return segment[0] if segment[0] > start else segment[1]

    def _fits(self, start: int, stop: int) -> bool:
        if self._scale.tokens(start, stop) > 1.5 * self._budget:
            return False
        if (start, stop) not in self._tokens_of:
            self._tokens_of[start, stop] = self._count(self._text[start:stop].strip())
        return self._tokens_of[start, stop] <= self._budget

    def _code_around(self, place: int) -> tuple[int, int] | None:
        index = bisect_right(self._code_starts, place) - 1
        if index >= 0 and place < self._code[index][1]:
            return self._code[index]
        return None

    def _within(self, way: str, start: int, stop: int) -> list[int]:
        key = (way, start, stop)
        if key not in self._starts_within:
            segment = self._text[start:stop]
            self._starts_within[key] = [
                start + place for place in WAYS[way](segment, self._language)
            ]
        return self._starts_within[key]


def _segment_at(starts: Sequence[int], place: int, around: tuple[int, int]) -> tuple[int, int]:
    """The segment of `around` that holds `place`; it may begin there, but not end there."""
    index = bisect_right(starts, place)
    start = starts[index - 1] if index else around[0]
    return start, starts[index] if index < len(starts) else around[1]


# --- blocks ----------------------------------------------------------------------------------

_MARKDOWN = MarkdownIt("commonmark").enable("table")
_MARKDOWN.core.ruler.enableOnly(["normalize", "block"])

_DEEPEST = 8
"""Lists in lists in quotes …: what is deeper is cut as if it were text."""


def _blocks_of(text: str) -> tuple[list[list[int]], dict[int, int]]:
    """The ways to cut between blocks, coarsest first; and from the start of each block that
    follows headings to where those start."""
    lines = [0, *(found.end() for found in LINE_END.finditer(text)), len(text)]
    blocks = [
        (lines[min(token.map[0], len(lines) - 1)], token)
        for token in _MARKDOWN.parse(text)
        if token.map and token.nesting >= 0 and token.type != "inline" and token.level < _DEEPEST
    ]
    heading_before: dict[int, int] = {}
    for (before, heading), (place, _) in pairwise(b for b in blocks if b[1].level == 0):
        if heading.tag in _HEADINGS:
            heading_before[place] = heading_before.get(before, before)
    sections = [
        [place for place, token in blocks if token.level == 0 and token.tag in _HEADINGS[:rank]]
        for rank in range(1, 7)
    ]
    with_heading = [p for p, token in blocks if token.level == 0 and p not in heading_before]
    levels = [
        [place for place, token in blocks if token.level <= level] for level in range(_DEEPEST)
    ]
    ways: list[list[int]] = []
    for starts in (*sections, with_heading, *levels):
        way = sorted({0, *starts})
        if not ways or way != ways[-1]:
            ways.append(way)
    return ways, heading_before


_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


# --- lengths ---------------------------------------------------------------------------------


class _Scale:
    """About how many tokens lie between two places, from counting every grain of a text once.
    A grain is so many characters, and goes on to the end of a word, unless that is too far."""

    def __init__(self, text: str, count: Count, grain: int) -> None:
        grains = re.findall(rf"(?s).{{1,{grain}}}\S{{0,{grain // 4}}}", text)
        self._places = [0, *accumulate(map(len, grains))]
        self._tokens = [0, *accumulate(map(count, grains))]

    def tokens(self, start: int, stop: int) -> float:
        return self._before(stop) - self._before(start)

    def reach(self, start: int, tokens: int) -> int:
        """The place about `tokens` behind `start`, one character at least."""
        target = self._before(start) + max(tokens, 0)
        index = bisect_right(self._tokens, target)
        if index == len(self._tokens):
            return self._places[-1]
        share = (target - self._tokens[index - 1]) / (self._tokens[index] - self._tokens[index - 1])
        grain = self._places[index] - self._places[index - 1]
        return max(start + 1, self._places[index - 1] + int(share * grain))

    def _before(self, place: int) -> float:
        index = min(bisect_right(self._places, place), len(self._places) - 1)
        if not index:
            return 0
        length = self._places[index] - self._places[index - 1]
        share = (place - self._places[index - 1]) / length
        return self._tokens[index - 1] + share * (self._tokens[index] - self._tokens[index - 1])


def _skip_space(text: str, place: int) -> int:
    found = re.compile(r"\s*").match(text, place)
    return found.end() if found else place
