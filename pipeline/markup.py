"""Marks: what must come out of the model as it went in. Code, URLs, placeholders and tags.

Found by shape, and rather too few than too many: a mark that was none would reject a good
answer. Every pattern is bounded or anchored, so that the time is linear in the text's length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["code", "url", "placeholder", "tag"]


@dataclass(frozen=True)
class Mark:
    """One mark in a text, at [start, stop)."""

    kind: Kind
    text: str
    """In the form that is compared: a tag without its attributes, which may be translated, but for
    where they lead and their placeholders; a code block without its indentation."""
    start: int
    stop: int


_NAME = r"[A-Za-z_][A-Za-z0-9_.-]{0,80}"
_VALUE = r"""(?:"[^"<>]{0,400}"|'[^'<>]{0,400}'|[^\s"'<>=]{1,200})"""
# In ASCII alone: Korean particles follow a URL without a space. Brackets are its own only in pairs,
# and an English 's is not.
_CHARACTER = r"[A-Za-z0-9\-._~:/?\#@!$&'*+,;=%]"
_INNER = rf"{_CHARACTER}|\({_CHARACTER}{{0,200}}\)|\[{_CHARACTER}{{0,200}}\]"
_URL = rf"""(?:(?:https?|ftp)://|(?<![A-Za-z0-9.])www\.)
    (?:(?!'s(?![\w\-/%?=&\#])){_CHARACTER}
      | \((?:{_INNER}){{0,200}}\)
      | \[(?:{_INNER}){{0,200}}\]
    )+"""

_PLACEHOLDER = r"""
      \{\{[^{}\n]{1,80}\}\}                       # {{ name }}
    | \$?\{[A-Za-z0-9_][A-Za-z0-9_.\[\]]{0,80}(?:![rsa])?(?::[^{}\s]{0,20})?\}
    | \{\}
    | %\([A-Za-z_][A-Za-z0-9_]{0,80}\)[-+0\#]{0,3}\d{0,3}(?:\.\d{1,3})?[sdiufgxr]
    # Not the percent sign of `5%do`, and no conversion that a word may begin with.
    | (?<![\d%])%(?:\d\$)?[-+0\#]{0,3}\d{0,3}(?:\.\d{1,3})?
          l{0,2}[sdiufgxr@](?![A-Za-z0-9])
"""

_INLINE = re.compile(
    rf"""
    (?P<code>
        # Known, but no code: the labels and references of reStructuredText, :ref:`x` and `x`_
        (?<!`)(?P<role>:?)`(?P<said>[^`<>\n]{{1,300}})(?:<(?P<target>[^`<>\n]{{1,300}})>)?`
            (?P<reference>_?)(?!`)
      | (?<!`)`[^`\n]{{1,300}}`(?!`)
      | (?<!`)``(?!`)[^\n]{{1,300}}?(?<!`)``(?!`)
    )
  | (?P<url>
        {_URL}
      | (?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{{1,64}}
            @[A-Za-z0-9][A-Za-z0-9.-]{{0,200}}\.[A-Za-z]{{2,20}}
      # [text](path/of/a/link), not [속보](종합), which is text in two kinds of brackets
      | (?<=\]\()(?=[^()\s]{{0,300}}[/.\#:?%=])[^()\s]{{1,300}}(?=\))
    )
  | (?P<placeholder>
        {_PLACEHOLDER}
    )
  | (?P<tag>
        # Lower case: <Parasite> is a title, as Korean text writes them.
        <(?P<name>/?\d{{1,4}}|[a-z][a-z0-9]{{0,30}}(?:[-:][a-z0-9]{{1,30}}){{0,3}})
            (?:\s{{1,20}}{_NAME}\s{{0,5}}=\s{{0,5}}{_VALUE})*\s{{0,20}}(?P<closed>/?)>
      | </(?P<end>[A-Za-z][A-Za-z0-9:-]{{0,40}})\s{{0,20}}>
    )
    """,
    re.VERBOSE,
)

_ATTRIBUTE = re.compile(rf"({_NAME})\s{{0,5}}=\s{{0,5}}({_VALUE})")
_LEADING = ("href", "src")
"""Attributes of which nothing is to be translated."""
_KEPT = re.compile(rf"{_URL}|{_PLACEHOLDER}", re.VERBOSE)
"""What is not, of any other."""

_HINTS = ("`", "<", "{", "%", "@", "://", "www.", "](", "~~~")
"""Without one of these there is no mark, as in most texts."""

_COMMAND = re.compile(r"\\[A-Za-z]{1,20}\*?(?:\{[^{}]{0,20}\})?$")
"""What stands before the brace in LaTeX's \\section{Introduction}, which is to be translated."""

# A longer row of tildes is a rule between paragraphs, in mail say, though code to CommonMark.
_FENCE = re.compile(r"[ \t]{0,12}(`{3,}|~{3,5}(?!~))(.*)")


def find_marks(text: str) -> list[Mark]:
    """All marks of `text`, in order; they do not overlap."""
    if not any(map(text.__contains__, _HINTS)):
        return []
    marks: list[Mark] = []
    position = 0
    for start, stop in [*fenced_blocks(text), (len(text), len(text))]:
        marks += _inline_marks(text, position, start)
        if start < stop:
            lines = [line.strip() for line in text[start:stop].strip().splitlines()]
            marks.append(Mark("code", "\n".join(lines), start, stop))
        position = stop
    return marks


def fenced_blocks(text: str) -> Iterator[tuple[int, int]]:
    """Where the ``` and ~~~ blocks of `text` are, [start, stop). One that nothing closes is none:
    a stray fence must not make code of a whole document."""
    if "```" not in text and "~~~" not in text:
        return
    fence, start, position = "", 0, 0
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line)
        if found and not fence and not (found[1][0] == "`" and "`" in found[2]):
            fence, start = found[1], position
        elif found and fence and found[1].startswith(fence) and not found[2].strip():
            yield start, position + len(line.rstrip())
            fence = ""
        position += len(line)


def _inline_marks(text: str, start: int, stop: int) -> Iterator[Mark]:
    for found in _INLINE.finditer(text, start, stop):
        match found.lastgroup:
            case "code":
                if found["target"]:
                    yield Mark("url", found["target"], *found.span())
                elif not (found["role"] or found["reference"]):
                    yield Mark("code", found[0], *found.span())
            case "url":
                url = _without_punctuation(found[0])
                yield Mark("url", url, found.start(), found.start() + len(url))
            case "placeholder":
                if not _COMMAND.search(text, max(0, found.start() - 60), found.start()):
                    yield Mark("placeholder", found[0], *found.span())
            case _:
                name = f"/{found['end']}" if found["end"] else found["name"] + found["closed"]
                kept = sorted(_kept(found[0]))  # they may change places
                yield Mark("tag", f"<{' '.join([name, *kept])}>", *found.span())


def _kept(tag: str) -> Iterator[str]:
    """The attributes of a tag that hold what must stay, with that alone."""
    for name, value in _ATTRIBUTE.findall(tag):
        inside = value.strip("\"'")
        if name.lower() not in _LEADING:
            inside = " ".join(_without_punctuation(found[0]) for found in _KEPT.finditer(inside))
        if inside:
            yield f'{name}="{inside}"'


def _without_punctuation(url: str) -> str:
    """The sentence's punctuation behind a URL is not its own, and an opening bracket is not, which
    other text may follow; a closing one is if it opens there too."""
    unopened = {")": url.count(")") - url.count("("), "]": url.count("]") - url.count("[")}
    closing = {"(": ")", "[": "]"}
    stop = len(url)
    while stop and (last := url[stop - 1]) in ".,;:!?'*_~)]([":
        if last in closing:
            unopened[closing[last]] += 1
        elif last in unopened:
            if unopened[last] <= 0:
                break
            unopened[last] -= 1
        stop -= 1
    return url[:stop]
