"""How a command ends: exit codes, the one error line, what is the user's to mend."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

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


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `UserError`s instead of usage text."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; {self.prog} --help explains")


def command(task: Callable[[Sequence[str]], None]) -> Callable[..., int]:
    """Make the entry point of a plain (non-Hydra) command from what it does with its arguments.

    The entry point takes the arguments, by default those of the process, and returns the exit code of `run_to_end`.
    """

    @functools.wraps(task)
    def main(arguments: Sequence[str] | None = None) -> int:
        given = sys.argv[1:] if arguments is None else arguments
        return run_to_end(lambda: task(given), plain_mistake, "interrupted")

    return main


def run_to_end(task: Callable[[], None], explain: Callable[[Exception], str | None], interrupted: str) -> int:
    """Run a command and turn its end into an exit code.

    Args:
        task: The command.
        explain: The error line for what the user can mend; None for an internal failure.
        interrupted: What an interrupted user is told.

    Returns:
        0 when it went well; 2 with ``error: ...`` as the last line of standard error for the user's mistake; 1 with
        a traceback for ours; 130 when interrupted; that of a library that ended the process.
    """
    try:
        task()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # the reader (head, less) has seen enough; the interpreter must not flush into the closed pipe at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        say(interrupted)
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except Exception as error:
        message = explain(error)
        if message is not None:
            return fail(message)
        print(hide_keys(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        say(f"error: internal failure ({type(error).__name__}); the traceback above says where")
        return INTERNAL_ERROR


def plain_mistake(error: Exception) -> str | None:
    """The error line of a command that only reads and writes files; None for an internal failure."""
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}; check its permissions and free space"
    return str(error) if isinstance(error, UserError) else None


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
