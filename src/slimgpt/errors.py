"""The exceptions a user can meet. Each message states the value, the rule and the fix.

::

    SlimGPTError
    ├── UsageError (also a ValueError)    an argument outside what is allowed
    │   ├── PlanError                     no widths can meet the ratio asked for
    │   ├── CalibrationError              text that is missing, unreadable or too short
    │   └── ChatTemplateError             messages that a chat template refuses
    ├── ModelError                        a model that is unknown, corrupt or refused
    │   └── UnsupportedFamilyError        a model whose layers are not described in the table
    ├── OutputError                       a folder that exists, a disk that is full
    ├── ExportError                       a model that a format cannot hold, or an engine that is not installed
    │   └── VerificationError             an exported model that computes something else (exit code 1)
    ├── ResumeError                       an unfinished run that this one cannot go on with
    ├── RankError                         another process of a distributed run has ended
    ├── NumericalError                    NaN, infinity, or a matrix that is not positive definite
    └── AssetError                        demo material that cannot be fetched or fails its hash
"""

from __future__ import annotations

import errno
import re

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no room: on the disk, in a quota, or for a file so large."""

UNUSABLE_PATH = (
    *(errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
)
"""What the system says of a path that is too long, may not be read or written, or is of another kind."""

_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")

_KEYWORDS = {"for": "engines", "export": "slimgpt.export(...)", "against": "the second argument"}
"""Of options that are not the name of their keyword."""

LONGEST_REASON = 400
"""Characters of another library's error that are repeated, about."""


class SlimGPTError(Exception):
    """Base of every error this package raises on purpose; the command line turns it into exit code 2.

    Messages name options as they are typed; where Python shows the error, a note below gives the keywords.
    """

    def __init__(self, *args: object):
        super().__init__(*args)
        flags = dict.fromkeys(_FLAG.findall(str(args[0]) if args else ""))
        if flags:
            keywords = (f"{_KEYWORDS.get(flag, flag.replace('-', '_'))} for --{flag}" for flag in flags)
            self.add_note(f"In Python, options are keywords: {', '.join(keywords)}.")


class UsageError(SlimGPTError, ValueError):
    """An argument outside what is allowed."""


class PlanError(UsageError):
    """No widths can meet the ratio asked for."""


class CalibrationError(UsageError):
    """Text that is missing, unreadable or too short."""


class ChatTemplateError(UsageError):
    """Messages that a chat template refuses."""


class ModelError(SlimGPTError):
    """A model that is unknown, corrupt or refused."""


class UnsupportedFamilyError(ModelError):
    """A model whose layers are not described in the table of architectures."""


class OutputError(SlimGPTError):
    """An output folder that exists, or a disk that is full."""


class ExportError(SlimGPTError):
    """A model that a format cannot hold, or an engine that is not installed."""


class VerificationError(ExportError):
    """An exported model that computes something else than the slim one; the command line turns it into exit code 1."""


class ResumeError(SlimGPTError):
    """An unfinished run of other settings, another model or other text."""


class RankError(SlimGPTError):
    """Another process of a distributed run has ended."""


class NumericalError(SlimGPTError):
    """NaN, infinity, or a matrix that is not positive definite."""


class AssetError(SlimGPTError):
    """Demo material that cannot be fetched or fails its hash."""


def one_line(error: Exception) -> str:
    """The message of another library's error, on one line; a long text only as far as :data:`LONGEST_REASON`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = lines[0]
    for line in lines[1:]:
        if len(text) + len(line) > LONGEST_REASON:
            return f"{text} ..."
        text += f" {line}"
    return text


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory left, of Python, of a GPU or of torch on the CPU, whose error has
    no class of its own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
