"""How a command ends: exit codes, the one error line, what is the user's to mend."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback

from trim_lightning.console.visible import visible
from trim_lightning.errors import UserError, first_line
from trim_lightning.privacy.keys import hide_keys

LONGEST_MESSAGE = 2000  # characters of the error line: what is in it may come from data
USER_ERROR, INTERNAL_ERROR, INTERRUPTED = 2, 1, 130
# what keeps a run from writing is the machine's state, for the user to mend
NOT_OURS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
    errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENAMETOOLONG,
}  # fmt: skip


def mistake(error: BaseException) -> str | None:
    """The error line for what the user can mend, be it wrapped by a library; None for an internal failure."""
    cause = user_error_within(error)
    if cause is not None:
        return str(cause)
    number = system_error(error)
    if number in NOT_OURS:
        name = getattr(error, "filename", None) or "a file"
        return (
            f"{name}: {os.strerror(number)}; free space or name another directory (hydra.run.dir, paths.output_dir, "
            "paths.store_dir); finished work is kept"
        )
    if is_out_of_memory(error):
        return (
            f"memory ran out ({first_line(error)}); in a training lower tokens_per_micro_batch of warmup or train, or "
            "set their gradient_checkpointing=true; else lower max_length; finished work is kept"
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """True where memory ran out, also in a run that never got to import PyTorch."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from trim_lightning.engine import memory

    return memory.is_out_of_memory(error)


def system_error(error: BaseException) -> int | None:
    """The system's error number, also of a library in Rust, which has it in its text alone; None if there is none."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def user_error_within(error: BaseException | None) -> UserError | None:
    """The user's mistake that a library wrapped in an exception of its own, if there is one."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


def fail(message: str) -> int:
    """Print the one error line and return exit code 2."""
    line = visible(" ".join(message.split()))
    say(f"error: {line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + ' ...'}")
    return USER_ERROR


def say(line: str) -> None:
    """Write one line, without keys, to standard error after everything that standard output holds back."""
    sys.stdout.flush()
    print(visible(hide_keys(line)), file=sys.stderr, flush=True)


def print_traceback() -> None:
    """Write the traceback of the exception that is being handled, without keys."""
    print(hide_keys(traceback.format_exc()), end="", file=sys.stderr, flush=True)
