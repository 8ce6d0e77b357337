"""The command line before Hydra sees it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser

from trim_lightning.console.terminal import wrapped
from trim_lightning.errors import UserError
from trim_lightning.settings.key import known_keys
from trim_lightning.store.processes import helper_folder

FULL_HELP = "--help-all"


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


def as_full_help(arguments: Sequence[str], command: str) -> list[str]:
    """The command line of ``--help-all``: Hydra's help with another template, after which `keys_text` follows."""
    kept = [argument for argument in arguments if argument != FULL_HELP]
    return with_overrides(["--help", *kept], f"hydra/help={command}_all")


def keys_text(schema: type) -> str:
    """Every key of a command with its default and meaning, in lines of at most 80 columns."""
    lines = ["Every key with its default (docs/configuration.md also has what each may be)"]
    for name, metadata, default in known_keys(schema):
        value = "" if default in ("???", "", {}, []) else json.dumps(default).strip('"')
        meaning = " or ".join(metadata["choices"]) if metadata["choices"] else ""
        lines.append(wrapped(f"{name}={value}", "  ", "    "))
        lines.append(wrapped(f"{metadata['meaning']}{f' ({meaning})' if meaning else ''}", " " * 6, " " * 6))
    return "\n".join(lines)


def with_overrides(arguments: Sequence[str], *more: str) -> list[str]:
    """The command line with further overrides among its own: argparse takes none after a flag that follows them."""
    found = (place for place, argument in enumerate(arguments) if "=" in argument and argument[0] != "-")
    place = next(found, len(arguments))
    return [*arguments[:place], *more, *arguments[place:]]


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
