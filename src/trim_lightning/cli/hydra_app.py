"""Entry points: Hydra in, exit codes and one clear error line out."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from trim_lightning.errors import UserError, first_line
from trim_lightning.privacy.paths import KeylessStream, hide_keys, hide_keys_in, hide_keys_in_logs, shareable_command
from trim_lightning.report.escape import visible
from trim_lightning.settings.compose import SCHEMAS, config_directory, explain, register_schemas, to_settings
from trim_lightning.settings.guard import guard_hydra
from trim_lightning.settings.schema import SelectSettings, TrainSettings
from trim_lightning.store.processes import PartDone, helper_folder, launched_rank
from trim_lightning.sweep.finished import finished_sweeps, sweep_name

log = logging.getLogger(__name__)

LONGEST_MESSAGE = 2000  # characters of the error line: what is in it may come from data
USER_ERROR, INTERNAL_ERROR, INTERRUPTED = 2, 1, 130
# what keeps a run from writing is the machine's state, for the user to mend
NOT_OURS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
    errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENAMETOOLONG,
}  # fmt: skip


def select_task(config: DictConfig) -> float | None:
    """One selection job; returns the coreset's mean score, which a Hydra sweeper may maximise."""
    settings = to_settings(config, SelectSettings)
    if settings.dry_run:
        plan_alone(settings)
        return None
    name_group(settings)
    from trim_lightning.pipeline.select import select

    selection = select(settings, command_line("trim-select"))
    print(f"\n{visible(selection.summary)}", flush=True)
    return float(selection.scores.score[selection.chosen].mean()) if len(selection.chosen) else None


def train_task(config: DictConfig) -> float | None:
    """One training job; returns the metric ``evaluation.objective``, which a Hydra sweeper may minimise."""
    settings = to_settings(config, TrainSettings)
    if settings.dry_run:
        plan_alone(settings)
        return None
    name_group(settings)
    from trim_lightning.pipeline.train import objective, train

    training = train(settings, command_line("trim-train"))
    if training.selection is not None:
        print(f"\n{visible(training.selection.summary)}", flush=True)
    print(f"\n{visible(training.summary)}", flush=True)
    return objective(training.metrics, settings.evaluation.objective)


def plan_alone(settings: SelectSettings) -> None:
    """Print the plan of a single job.

    Raises:
        UserError: if it cannot run.
    """
    from trim_lightning.sweep.dry_run import dry_run

    plan = dry_run({0: settings}, Path(settings.paths.output_dir))
    if plan.problems:
        raise UserError(plan.problems[0])


def command_line(program: str) -> str:
    """The command that repeats this job alone, as it may be shown to others."""
    return shlex.join(shareable_command([program, *HydraConfig.get().overrides.task]))


def name_group(settings: SelectSettings) -> None:
    """Let the tracker group the jobs of a multirun under the sweep's own name, unless the user named a group."""
    if in_multirun() and settings.logger.group is None:
        settings.logger.group = sweep_name(Path(HydraConfig.get().sweep.dir))


def train_main() -> int:
    """``trim-train``: fine-tune on a coreset and measure what it bought."""
    return run("train", train_task)


def select_main() -> int:
    """``trim-select``: choose a coreset."""
    return run("select", select_task)


def run(config_name: str, task: Callable[[DictConfig], Any]) -> int:
    """Run a Hydra application and turn its end into an exit code.

    0 when it went well; 2 with ``error: ...`` as the last line of standard error for the user's mistake; 1 with a
    traceback for ours; 130 when interrupted.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises rather than prints: the last line is ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.raiseExceptions = False  # a log file on a full disk is no reason for a traceback a line
    # a scheduler's SIGTERM ends a run as Ctrl-C does: finished shards and checkpoints stay
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.argv[1:] = [expand_home(argument) for argument in sys.argv[1:]]
    if launched_rank() > 0:
        sys.argv[1:] = as_helper(sys.argv[1:])
    job = Job(task)
    try:
        sys.argv[1:] = as_dry_run(sys.argv[1:])
        check_flags()
        register_schemas()
        guard_hydra()
        with job.unmuted():
            hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=config_name)(job)()
        return 0
    except UserError as error:
        return fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return fail(explain(error, SCHEMAS[config_name]))
    except BrokenPipeError:
        # the reader (head, less) has seen enough; the interpreter must not flush into the closed pipe at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        say("\ninterrupted: finished work is kept; the same command goes on from there")
        return INTERRUPTED
    except SystemExit as error:
        return exit_code(error, job)
    except Exception as error:
        return unexpected(error, job)
    finally:
        report_sweeps()


class Job:
    """A Hydra task that notes whether it began, and leaves the telling of a user's mistake to the entry point."""

    def __init__(self, task: Callable[[DictConfig], Any]) -> None:
        functools.update_wrapper(self, task)
        self.task = task
        self.began = False

    def __call__(self, config: DictConfig) -> Any:
        """Run the task; in a multirun a mistake is logged at once, since the other jobs go on."""
        self.began = True
        hide_keys_in(hydra_records())
        hide_keys_in_logs()
        try:
            return self.task(config)
        except PartDone:
            return None
        except Exception as error:
            message = mistake(error)
            if message is not None and in_multirun():
                log.error("this job failed: %s", message)
            elif not in_multirun():
                # Hydra prints all overrides before it raises: noise above our line
                sys.stderr = io.StringIO()
            raise

    @contextlib.contextmanager
    def unmuted(self) -> Any:
        """Keep keys off the terminal: Hydra prints and logs the overrides of jobs; give the streams back at the end."""
        own = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(KeylessStream, own)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = own


def hydra_records() -> list[Path]:
    """The files in which Hydra keeps what was asked: of this job, and of its multirun."""
    if not HydraConfig.initialized():
        return []
    hydra_config = HydraConfig.get()
    found = []
    if hydra_config.output_subdir is not None:
        found += sorted((Path(hydra_config.runtime.output_dir) / hydra_config.output_subdir).glob("*.yaml"))
    if hydra_config.mode == RunMode.MULTIRUN:
        found.append(Path(hydra_config.sweep.dir) / "multirun.yaml")
    return found


def in_multirun() -> bool:
    """True inside a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def expand_home(argument: str) -> str:
    """Put the home directory for ``~/`` at the start of a value: no shell does there, and Hydra cannot read it."""
    return re.sub(r"(?<=[=,])~/", lambda _: os.path.join(os.path.expanduser("~"), ""), argument)


def as_helper(arguments: Sequence[str]) -> list[str]:
    """The command line for a process that helps the first one: no Hydra files, no warnings twice."""
    folders = ("hydra.run.dir=", "hydra.sweep.dir=", "hydra.output_subdir=")
    kept = [argument for argument in arguments if not argument.startswith(folders)]
    nowhere = helper_folder()
    return with_overrides(
        kept, f"hydra.run.dir={nowhere}", f"hydra.sweep.dir={nowhere}", "hydra.output_subdir=null",
        "hydra.job_logging.loggers.trim_lightning.level=ERROR",
    )  # fmt: skip


def as_dry_run(arguments: Sequence[str]) -> list[str]:
    """The command line of a dry run: its files go to a folder of their own, so that no run's own record is changed.

    That is ``plan`` below the folder that is named for the run or the sweep, else one under ``plans``.

    Raises:
        UserError: for a sweep over ``dry_run`` itself.
    """
    asked = [argument.removeprefix("dry_run=") for argument in arguments if argument.startswith("dry_run=")]
    if not asked or asked[-1].lower() in ("false", "no", "off", "0"):
        return list(arguments)
    if "," in asked[-1]:
        raise UserError(f"dry_run={asked[-1]}: all jobs are planned or none; give dry_run=true")
    places = {"hydra.run.dir": ("hydra.run.dir=", "paths.output_dir="), "hydra.sweep.dir": ("hydra.sweep.dir=",)}
    apart = (*places["hydra.run.dir"], *places["hydra.sweep.dir"], "hydra.output_subdir=")
    more = ["hydra.output_subdir=null"]
    for key, names in places.items():
        named = [argument.partition("=")[2] for argument in arguments if argument.startswith(names)]
        where = f"{named[-1]}/plan" if named else "plans/${hydra.job.name}/${now:%Y-%m-%d}/${now:%H-%M-%S}"
        more.append(f"{key}={where}")
    return with_overrides([argument for argument in arguments if not argument.startswith(apart)], *more)


def with_overrides(arguments: Sequence[str], *more: str) -> list[str]:
    """The command line with further overrides among its own: argparse takes none after a flag that follows them."""
    found = (place for place, argument in enumerate(arguments) if "=" in argument and argument[0] != "-")
    place = next(found, len(arguments))
    return [*arguments[:place], *more, *arguments[place:]]


def report_sweeps() -> None:
    """Tell the tracker of each finished sweep as a whole; a tracker that fails takes no result with it."""
    while finished_sweeps:
        folder, logger = finished_sweeps.popitem()
        try:
            from trim_lightning.sweep.summary_run import log_summary

            log_summary(folder, logger, sweep_name(folder))
        except Exception as error:
            log.warning("W&B: no summary of the sweep (%s)", first_line(error))


def check_flags() -> None:
    """Parse the command line's flags before Hydra does.

    Raises:
        UserError: in place of the usage text that argparse prints.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            get_args_parser().parse_args()
    except SystemExit as error:
        if not error.code:
            raise
        reason = printed.getvalue().strip().rpartition("error: ")[2]
        unknown_flag = any(word.startswith("-") for word in reason.partition("arguments: ")[2].split())
        if reason.startswith("unrecognized") and not unknown_flag:  # argparse loses overrides around a flag
            raise UserError(f"{reason}; put flags such as -m before the first key=value") from None
        raise UserError(f"{reason}; --hydra-help lists the flags") from None


def exit_code(error: SystemExit, job: Job) -> int:
    """The exit code of a library that ended the process; before the job began, that is Hydra over the flags."""
    if error.code is None or error.code == 0:
        return 0
    if job.began:
        return INTERNAL_ERROR
    return fail("the command line asks for something that is not there; the line above says what")


def unexpected(error: Exception, job: Job) -> int:
    """Tell the user's mistakes from internal failures among all other exceptions."""
    message = mistake(error)
    if message is not None:
        return fail(message)
    if isinstance(error, ValueError) and not job.began:
        return fail(f"config: {first_line(error)}; --help and --hydra-help say what the command line takes")
    print_traceback()
    say(f"error: internal failure ({type(error).__name__}); the traceback above says where")
    return INTERNAL_ERROR


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
