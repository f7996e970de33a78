"""Users' own code, named in a job file as `module:name`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


def import_named(path: str) -> Any:
    """What `module:name` names; modules of the current directory are found too, behind the
    installed ones. Raises ValueError."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"`{path}` is not of the form module:name")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(import_module(module), name)
    except AttributeError:
        raise ValueError(f"`{path}`: {module} has no `{name}`") from None
    except Exception as error:  # whatever the user's module raises
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"`{path}` can't be imported, also not from {Path.cwd()}: {why}") from None


def modules_in(folder: Path) -> list[Path]:
    """Files and packages of `folder` that this process has imported."""
    found = {_place(module) for name, module in sys.modules.items() if "." not in name}
    return sorted(place for place in found if place and place.parent == folder)


def _place(module: ModuleType) -> Path | None:
    """The file or, of a package, the folder that it was imported from."""
    for folder in getattr(module, "__path__", ()):
        return Path(folder)
    file = getattr(module, "__file__", None)
    return Path(file) if file else None
