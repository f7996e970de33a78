"""Reading a job file: YAML, overrides, and errors that name the key, the mistake and a remedy."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipeline.config import JobConfig
from pipeline.config.section import SecretInJobFile, Section
from pipeline.errors import JobFileError

S = TypeVar("S", bound=Section)


def load_job(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file and apply `a.b=c` overrides (values are YAML).

    Raises:
        JobFileError: no such file, not YAML, an unknown key, a wrong type or value.
    """
    tree = _read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    return parse_section(JobConfig, tree, where=str(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # noqa: S506 (is safe)
    except FileNotFoundError:
        raise JobFileError(f"{path}: no such job file", "See configs/ for files to copy.") from None
    except UnicodeDecodeError:
        raise JobFileError(f"{path}: is not UTF-8 text", "Save it as UTF-8.") from None
    except ValueError as error:
        raise JobFileError(f"{path}: not valid YAML: {error}", "Put it in quotes.") from None
    except OSError as error:
        raise JobFileError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise JobFileError(f"{path}{line}: not valid YAML: {problem}") from None
    tree = _with_whole_characters(tree, path)
    if not isinstance(tree, dict):
        raise JobFileError(
            f"{path}: is not a job file (no keys at the top)",
            "A job file starts with `name:`; see configs/ for files to copy.",
        )
    return tree


def _with_whole_characters(value: Any, path: Path) -> Any:
    r"""`value` with each \ud83d\ude00 as the one character that JSON means by it; YAML takes it
    for two halves. Raises JobFileError for a half alone."""
    match value:
        case str():
            try:
                return value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise JobFileError(f"{path}: holds half a character (\\ud800 to \\udfff)") from None
        case list():
            return [_with_whole_characters(item, path) for item in value]
        case dict():
            return {
                _with_whole_characters(key, path): _with_whole_characters(item, path)
                for key, item in value.items()
            }
    return value


MERGE = "tag:yaml.org,2002:merge"
"""Of the key `<<`, whose keys may be there twice."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which would let the second of two equal keys win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(
                    problem="what begins with a brace or bracket is no text; put it in quotes",
                    problem_mark=key_node.start_mark,
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key `{key}` is there twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise JobFileError(
            f"--set {override}: not of the form a.b=c", "Example: --set output.path=out"
        )
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise JobFileError(f"--set {override}: `{parent}` holds a value, not further keys")
        tree = child
    try:
        tree[leaf] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # a ValueError of a date that is none
        raise JobFileError(f"--set {override}: the value is not valid YAML") from None


def parse_section(section: type[S], tree: Any, where: str, prefix: str = "") -> S:
    """Validate `tree`; the first error becomes a JobFileError that names file, key and remedy."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise _job_file_error(section, error, where, prefix) from None


def _job_file_error(
    section: type[Section], error: ValidationError, where: str, prefix: str
) -> JobFileError:
    # An unknown key explains the missing one it was meant to be, so it comes first.
    errors = sorted(error.errors(), key=_how_little_it_explains)
    first, more = errors[0], len(errors) - 1
    path = [str(part) for part in first["loc"]]
    location = [part for part in path if not _is_union_label(part)] or path
    key = (prefix + ".".join(location)).rstrip(".")
    rest = f" (and {more} more)" if more else ""
    match first["type"]:
        case "extra_forbidden":
            known = _known_keys(section, location[:-1])
            return JobFileError(f"{where}: {key}: unknown key{rest}", _nearest(location[-1], known))
        case "missing":
            return JobFileError(f"{where}: {key}: is missing{rest}", _meaning(section, location))
        case _:
            message = first["msg"].removeprefix("Value error, ")
            given = first["input"]
            is_short = isinstance(given, str | int | float | bool) and len(repr(given)) <= 80
            shown = f" (it is {given!r})" if is_short else ""
            if isinstance(first.get("ctx", {}).get("error"), SecretInJobFile):
                shown = ""
            hint = _meaning(section, location)
            if isinstance(given, bool) and "string" in message:
                hint = "YAML reads yes, no, on and off as true and false; put the word in quotes."
            return JobFileError(f"{where}: {key}: {message}{shown}{rest}", hint)


def _how_little_it_explains(error: Any) -> int:
    """Errors of one union come together: those of the branch that was meant come first."""
    if error["type"] == "extra_forbidden":
        return 0
    is_other_branch = error["type"] in ("int_type", "string_type", "model_type", "list_type")
    return 2 if is_other_branch and isinstance(error["input"], dict | list) else 1


def _meaning(section: type[Section], location: Sequence[str]) -> str:
    """What the field's own documentation says."""
    fields = _fields_at(section, location[:-1])
    field = fields.get(location[-1]) if location else None
    return " ".join((field.description or "").split()) if field else ""


def _is_union_label(part: str) -> bool:
    return part in {"int", "str", "ReplicaRange"} or part.startswith(("list[", "function-"))


def _known_keys(section: type[Section], location: Sequence[str]) -> list[str]:
    return sorted(_fields_at(section, location))


def _fields_at(section: type[Section], location: Sequence[str]) -> dict[str, Any]:
    """The fields at `location`, walking down the sections."""
    fields = _by_key(section)
    for part in location:
        if part not in fields:
            return {}
        kinds = [fields[part].annotation, *getattr(fields[part].annotation, "__args__", ())]
        nested = [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
        fields = _by_key(nested[0]) if nested else {}
    return fields


def _by_key(section: type[Section]) -> dict[str, Any]:
    """Fields by the names that they have in a job file."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _nearest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean `{near[0]}`?"
    return f"Known keys here: {', '.join(known)}."
