"""What every section of a job file is, and what none may hold."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the job file: immutable, and strict about names and types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class SecretInJobFile(ValueError):
    """The value must not be shown in the message."""


# user@host, key:secret@bucket (a secret may hold slashes), and signed or keyed queries.
CREDENTIALS = re.compile(
    r"://([^/]*@|[^/@]*:[^@]*@|.*\?.*(signature|token|key|secret)[^/]*=|.*\?(.*&)?sig=)", re.I
)


def without_credentials(url: str) -> str:
    if CREDENTIALS.search(url):
        raise SecretInJobFile("holds credentials; take them out and use environment variables")
    return url


def check_json(value: Any) -> None:
    """Raises ValueError if JSON does not hold `value` as it is: YAML knows more than that."""
    try:
        same = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"is no JSON ({error}); put dates in quotes") from None
    if same != value:
        raise ValueError("has a key that is no text; put words such as yes and on in quotes")
