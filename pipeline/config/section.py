"""What every section of a job file is, and what none may hold."""

from __future__ import annotations

import re

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
