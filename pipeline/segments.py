"""Where a text may be cut inside a block: sentences, lines, words, marks, graphemes.

Sentences, words and graphemes are found by ICU. See chunking for which way is tried when.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from icu4py.breakers import BaseBreaker, CharacterBreaker, SentenceBreaker, WordBreaker

from pipeline.markup import find_marks

LINE_END = re.compile(r"\r\n?|\n")

_NO_END = re.compile(
    r"(?:^|[.!?\r\n]\s*)(?:\d{1,3}|[가-힣])[.)]\s*$|\b(?:[A-Z]|Dr|Fig|No|Prof|St|Vol)\.\s*$"
)
"""What ICU takes for the end of a sentence: an enumerator (`3. `, `가. `), `Dr. `, `J. `."""

_ENDED = re.compile(r"(?:\s|[。！？…｡][」』”’）)\]】》]?)$")


def _sentences(text: str, language: str) -> Iterator[int]:
    """Ends of sentences that whitespace follows, or none in scripts that write none."""
    # To ICU every line is a sentence, but a paragraph may have been wrapped by hand.
    flat = re.sub(r"[\r\n]", " ", text)
    for place in _breaks(SentenceBreaker, flat, f"{language}-u-ss-standard"):
        before = text[max(0, place - 12) : place]
        if _ENDED.search(before) and not _NO_END.search(before):
            yield place


def _lines(text: str, language: str) -> Iterator[int]:
    return (found.end() for found in LINE_END.finditer(text))


def _words(text: str, language: str) -> Iterator[int]:
    return (found.end() for found in re.finditer(r"\s+", text))


def _mark_edges(text: str, language: str) -> list[int]:
    marks = find_marks(text)
    return sorted({place for mark in marks for place in (mark.start, mark.stop)})


def _unspaced_words(text: str, language: str) -> Iterator[int]:
    return _breaks(WordBreaker, text, language)


def _graphemes(text: str, language: str) -> Iterator[int]:
    return _breaks(CharacterBreaker, text, language)


def _breaks(breaker: type[BaseBreaker], text: str, locale: str) -> Iterator[int]:
    # Its indices count UTF-16 units, and it takes no lone surrogates; lengths are ours.
    segments = breaker(text.encode("utf-8", "replace").decode(), locale)
    return accumulate(map(len, segments))


def _outside_marks(way: Callable[[str, str], Iterable[int]]) -> Callable[[str, str], list[int]]:
    """A way to cut that spares URLs, placeholders, tags and code."""

    def places(text: str, language: str) -> list[int]:
        marks = find_marks(text)
        starts = [mark.start for mark in marks]
        return [
            place
            for place in way(text, language)
            if not (index := bisect_left(starts, place)) or marks[index - 1].stop <= place
        ]

    return places


WAYS: dict[str, Callable[[str, str], Iterable[int]]] = {
    "sentences": _outside_marks(_sentences),
    "lines": _outside_marks(_lines),
    "code lines": _lines,
    "words": _outside_marks(_words),
    "code words": _words,
    "marks": _mark_edges,
    "unspaced words": _unspaced_words,
    "graphemes": _graphemes,
}
"""Starts of segments inside a text; its own start and end may be among them."""

PROSE_WAYS = ("sentences", "lines", "words", "marks", "unspaced words", "graphemes")
CODE_WAYS = ("code lines", "code words", "graphemes")
