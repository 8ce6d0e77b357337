"""Entry points: Hydra in, exit codes and one clear error line out."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from trim_lightning.config import config_directory, explain, register_schemas, to_settings
from trim_lightning.errors import UserError
from trim_lightning.settings import SelectSettings

log = logging.getLogger(__name__)

USER_ERROR, INTERNAL_ERROR, INTERRUPTED = 2, 1, 130


def select_task(config: DictConfig) -> float | None:
    """One selection job; returns the coreset's mean score, which a Hydra sweeper may maximise."""
    settings = to_settings(config, SelectSettings)
    from trim_lightning.pipeline import select

    selection = select(settings)
    print(f"\n{selection.summary}", flush=True)
    return float(selection.scores.score[selection.chosen].mean()) if len(selection.chosen) else None


def select_main() -> int:
    """``trim-select``: choose a coreset."""
    return run("select", select_task)


def run(config_name: str, task: Callable[[DictConfig], Any]) -> int:
    """Run a Hydra application and turn its end into an exit code.

    0 when it went well; 2 with ``error: ...`` as the last line of standard error for the user's mistake; 1 with a
    traceback for ours; 130 when interrupted.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises rather than prints: the last line is ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # a scheduler's SIGTERM ends a run as Ctrl-C does: finished shards and checkpoints stay
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        register_schemas()
        hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=config_name)(task)()
        return 0
    except UserError as error:
        return fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return fail(explain(error))
    except KeyboardInterrupt:
        say("interrupted: finished work is kept; the same command goes on from there")
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else USER_ERROR
    except Exception as error:
        cause = user_error_within(error)
        if cause is not None:
            return fail(str(cause))
        traceback.print_exc()
        say(f"error: internal failure ({type(error).__name__}); the traceback above says where")
        return INTERNAL_ERROR


def user_error_within(error: BaseException | None) -> UserError | None:
    """The user's mistake that a library wrapped in an exception of its own, if there is one."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


def fail(message: str) -> int:
    """Print the one error line and return exit code 2."""
    say(f"error: {' '.join(message.split())}")
    return USER_ERROR


def say(line: str) -> None:
    """Write one line to standard error after everything that standard output holds back."""
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
