"""What the plain (non-Hydra) commands share: the parser, the one error line, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from trim_lightning.cli.exits import INTERNAL_ERROR, INTERRUPTED, fail, print_traceback, say
from trim_lightning.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `UserError`s instead of usage text."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; {self.prog} --help explains")


def run_command(task: Callable[[Sequence[str]], None], arguments: Sequence[str] | None) -> int:
    """Run a command and turn its end into an exit code.

    Args:
        task: The command; gets the arguments.
        arguments: The arguments; None takes those of the process.

    Returns:
        0 when it went well; 2 with ``error: ...`` as the last line of standard error for the user's mistake; 1 with
        a traceback for ours; 130 when interrupted.
    """
    try:
        task(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return 0
    except UserError as error:
        return fail(str(error))
    except BrokenPipeError:
        # the reader (head, less) has seen enough; the interpreter must not flush into the closed pipe at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except OSError as error:
        return fail(f"{error.filename or 'a file'}: {error.strerror or error}; check its permissions and free space")
    except Exception as error:
        print_traceback()
        say(f"error: internal failure ({type(error).__name__}); the traceback above says where")
        return INTERNAL_ERROR
