"""Every error a user can meet, in one tree. The message says what, where and what next.

AxbatchError
├── JobFileError        the job file or the arguments are wrong              exit 2
├── InputError          the input is missing, unreadable or unsuitable       exit 2
│   └── NoSuchFileError a file that was there when it was listed is gone
├── ModelError          the model folder or its options are wrong            exit 2
├── RefusedError        changed identity or input, or another run is active  exit 4
├── StorageError        storage refused or did not answer                    exit 1
├── ClusterError        Ray is not there, or has too little room             exit 1
├── EngineError         the engine did not start or is gone                  exit 1
├── TooManyNotOkError   the job was ended early: it would end with exit 3    exit 3
├── VerifyError         the output is not what was promised                  exit 1
└── RowError            one row or one request; becomes the row's status
    ├── RowRejected     this input cannot be done as asked
    ├── RowDeferred     it is too long for this lane's engine, not for the next lane's
    └── RowFailed       the machinery failed; trying again may help
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path

EXIT_TOO_MANY_NOT_OK = 3
EXIT_INTERRUPTED = 130


class AxbatchError(Exception):
    """Base of all errors that are shown to the user as one or two lines."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\n  {self.hint}" if self.hint else message

    def to_json(self) -> str:
        """Class, message and hint, to cross a process border; see `error_from_json`."""
        message = str(self.args[0])
        return json.dumps({"error": type(self).__name__, "message": message, "hint": self.hint})


def error_from_json(text: str) -> AxbatchError:
    """The inverse of `AxbatchError.to_json`."""
    fields = json.loads(text)
    error_class: type[AxbatchError] = globals()[fields["error"]]
    return error_class(fields["message"], fields["hint"])


class JobFileError(AxbatchError):
    """The job file or a command-line argument is wrong."""

    exit_code = 2


class InputError(AxbatchError):
    """The input is missing, unreadable, or lacks what the task needs."""

    exit_code = 2


class NoSuchFileError(InputError):
    """A file that was there when it was listed is gone."""


class ModelError(AxbatchError):
    """The model folder, its id or its engine options are wrong."""

    exit_code = 2


class RefusedError(AxbatchError):
    """Going on would mix two different jobs, or two runs, in one output."""

    exit_code = 4


class StorageError(AxbatchError):
    """Storage refused, is full, or did not answer."""


class ClusterError(AxbatchError):
    """Ray cannot be reached or cannot hold the replicas asked for."""


class EngineError(AxbatchError):
    """The engine did not start, or died and can't be replaced."""


class TooManyNotOkError(AxbatchError):
    """So many rows are not ok that going on only costs money."""

    exit_code = EXIT_TOO_MANY_NOT_OK


class VerifyError(AxbatchError):
    """The output is not the input plus results, row for row."""


class RowError(AxbatchError):
    """One row's trouble. `reason` is `code` or `code: detail`, machine-readable up to the colon."""

    @property
    def reason(self) -> str:
        return str(self.args[0])

    @property
    def code(self) -> str:
        return self.reason.partition(":")[0]


class RowRejected(RowError):
    """This input cannot be done as asked; trying again changes nothing."""


class RowDeferred(RowError):
    """This row needs a longer context than this lane's engine has; the next lane has it."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"deferred: {tokens} tokens")
        self.tokens = tokens
        """Of prompt and answer together."""


class RowFailed(RowError):
    """The machinery failed on this row; trying again may help."""


def place_of(error: BaseException) -> str:
    """Its type, and where it was raised; not its message, which may quote a row."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; exit 130. Not an Exception, so that nothing swallows it."""
