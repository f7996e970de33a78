"""Jinja templates over a row's columns: sandboxed, strict about names, and short of breath.

`{{ title }}` is the column `title`; a null may be tested (`{% if title %}`), but not printed.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import count
from typing import Any, NoReturn
from uuid import UUID

from jinja2 import (
    StrictUndefined,
    TemplateError,
    TemplateSyntaxError,
    Undefined,
    meta,
    nodes,
    pass_context,
)
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import RowRejected
from pipeline.records import Row

MOST_CHARACTERS = 4_000_000
"""Of a rendered template; more than any model's context holds."""

MOST_STEPS = 100_000
"""Of all loops of one rendering together."""

MOST_POWER = 64

PRINTED_BYTES = "not_text: bytes that the template prints"

_STEPS = "steps of all loops"
"""Where a rendering counts them; no column of a template can have this name."""


class Template:
    """A template of a job file. Its own words are trusted, the row's are only data to it."""

    def __init__(self, source: str) -> None:
        """Raises ValueError, with the line, if `source` is no template."""
        try:
            tree = _ENVIRONMENT.parse(source)
            self.columns = sorted(meta.find_undeclared_variables(tree) | _named_as_functions(tree))
            """What `render` reads of a row."""
            _refuse_other_files(tree)
            _count_steps(tree)
            self._compiled = _ENVIRONMENT.from_string(tree)
        except TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from None

    def render(self, row: Row, clean: Callable[[str], str] = str) -> str:
        """The text for this row, made safe once more by `clean` (see task.Generate): two columns
        side by side may hold what the tokenizer takes for one control token.

        Raises RowRejected: `null` for a null that would be printed, `template_error` where the
        template does not suit the row's values or makes too much of them.
        """
        values = {column: _guarded(row[column], column) for column in self.columns}
        pieces, length = [], 0
        try:
            for piece in self._compiled.generate({**values, _STEPS: count(1)}):
                pieces.append(piece)
                length += len(piece)
                if length > MOST_CHARACTERS:
                    break
        except (
            TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
            ValueError,
        ) as error:  # fmt: skip
            # The type and the line alone: the message may quote the row.
            raise RowRejected(
                f"template_error: {type(error).__name__} in line {_line_of(error)}"
            ) from None
        if length > MOST_CHARACTERS:
            raise RowRejected(f"template_error: more than {MOST_CHARACTERS:,} characters")
        text = "".join(pieces)
        return clean(text) if self.columns else text


class Null:
    """A null of a row. It is false and none; whatever needs its value rejects the row."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Null)

    def __hash__(self) -> int:
        return hash(None)

    def __repr__(self) -> str:
        return "null"

    def _reject(self, *_: object) -> NoReturn:
        raise RowRejected(f"null: {self._path}")

    __str__ = __format__ = __getitem__ = __iter__ = __len__ = __call__ = _reject
    __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = _reject
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _reject
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _reject


class Bytes(bytes):
    """Bytes of a row. They may be tested and decoded; printed, they would be Python's b'…'."""

    def __new__(cls, value: bytes, path: str) -> Bytes:
        made = super().__new__(cls, value)
        made._path = path
        return made

    _path: str

    def _reject(self, *_: object) -> NoReturn:
        raise RowRejected(f"not_text: {self._path}")

    __str__ = __repr__ = __format__ = _reject


def _guarded(value: Any, path: str) -> Any:
    """`value` with a Null in the place of each None, and Bytes of bytes, at any depth."""
    if value is None:
        return Null(path)
    if isinstance(value, Mapping):
        return {key: _guarded(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_guarded(item, path) for item in value)
    return Bytes(value, path) if isinstance(value, bytes) else value


class _Environment(ImmutableSandboxedEnvironment):
    """Without loops, texts and numbers that have no end."""

    intercepted_binops = frozenset({"*", "**"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        """A field of a struct comes before Python's own `items` or `values`."""
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and right > MOST_POWER:
            raise SecurityError("the power is too high")
        for some, times in ((left, right), (right, left)):
            if isinstance(some, str | list | tuple) and len(some) * times > MOST_CHARACTERS:
                raise SecurityError("the product is too long")
        return super().call_binop(context, operator, left, right)


def _printable(value: Any) -> Any:
    if value is None:
        raise RowRejected("null: a value that the template prints")
    if isinstance(value, bytes) and not isinstance(value, Bytes):  # made of a row's
        raise RowRejected(PRINTED_BYTES)
    if callable(value) and not isinstance(value, Null | Undefined):
        raise TypeError("a method of Python, where the text has no such field")
    return value


@pass_context
def _counted(context: Context, some: Iterable[Any]) -> Iterator[Any]:
    """`some`, as long as the loops of this rendering have made few enough steps."""
    for item in some:
        if next(context[_STEPS]) > MOST_STEPS:
            raise SecurityError("the loops make too many steps")
        yield item


def _to_json(value: Any) -> str:
    """As it stands in a prompt: Jinja's own is made for HTML."""
    return json.dumps(value, ensure_ascii=False, default=_json_value)


def _json_value(value: Any) -> Any:
    if isinstance(value, Null):
        return None
    if isinstance(value, date | time | timedelta | Decimal | UUID):
        return str(value)
    if isinstance(value, bytes):
        raise RowRejected(PRINTED_BYTES)
    raise TypeError(f"{type(value).__name__} has no JSON")


def _environment() -> _Environment:
    environment = _Environment(
        undefined=StrictUndefined, finalize=_printable, trim_blocks=True, lstrip_blocks=True
    )
    # Any other global would stand in the place of a column of its name.
    environment.globals = {name: environment.globals[name] for name in ("range", "namespace")}
    environment.filters |= {"counted": _counted, "tojson": _to_json}
    environment.tests["none"] = lambda value: value is None or isinstance(value, Null)
    return environment


_ENVIRONMENT = _environment()


def _named_as_functions(tree: nodes.Template) -> set[str]:
    """Columns that have the name of a function of Jinja, of which it says nothing itself."""
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    names = [name for name in tree.find_all(nodes.Name) if name.name in _ENVIRONMENT.globals]
    functions = {name.name: name.lineno for name in names if id(name) in called}
    own = {name.name for name in names if name.ctx != "load"}
    columns = {name.name for name in names if id(name) not in called} - own
    for name in columns & functions.keys():
        raise TemplateSyntaxError(f"`{name}` is a column elsewhere, no function", functions[name])
    return columns


def _refuse_other_files(tree: nodes.Template) -> None:
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise TemplateSyntaxError("a template can't use another file", node.lineno)


def _count_steps(tree: nodes.Template) -> None:
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
    tree.set_environment(_ENVIRONMENT)


def _line_of(error: BaseException) -> int:
    """Of the template; Jinja has put its lines into the traceback."""
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename in ("<template>", "<unknown>")
    ]
    return lines[-1] if lines else 1
