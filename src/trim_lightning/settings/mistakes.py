"""Mistyped keys and options in the user's words: what is wrong, and what was perhaps meant."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from hydra.conf import HydraConf
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, MissingMandatoryValue, ValidationError

from trim_lightning.errors import first_line, nearest, suggest
from trim_lightning.settings.key import known_keys
from trim_lightning.settings.schema import TrainSettings

GROUPS = (
    "model", "pool", "target", "warmup", "saliency", "fingerprint", "scoring", "fallback", "pooler", "method",
    "selection", "trainer", "logger", "paths", "train", "evaluation", "experiment", "hparams_search", "debug",
)  # fmt: skip
RECIPES = ("experiment", "hparams_search", "debug")  # groups that set keys of others
HYDRA_GROUPS = tuple(f"hydra/{name}" for name in ("launcher", "sweeper", "job_logging", "hydra_logging", "help", "env"))
TRAINING_ONLY = ("hparams_search", "coreset", "train", "evaluation")
EXTRAS = {"hydra/sweeper/optuna": "optuna"}  # what an extra of this package installs


def explain(error: BaseException, schema: type) -> str:
    """One line on what is wrong with the overrides or the config, with the likely remedy.

    Keys of the command's settings class ``schema`` may be suggested.
    """
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = "\n".join(str(cause) for cause in causes)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: not an override; write key=value, and put quotes around a value with blanks, commas "
            "or brackets, inside those of the shell: 'key=\"a, b\"'"
        )
    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    found = re.search(r"Ambiguous value for argument '(.+?)'", text)
    if found:
        key, value = found.group(1).split("=", 1)
        return f"{found.group(1)}: several values; add -m to run them all, or quote one text: '{key}=\"{value}\"'"
    found = re.search(r"Sweep parameters '(.+?)' requires", text)
    if found:
        return f"{found.group(1)}: several values; add -m to run them all"
    found = re.search(r"already at '(.+?)'", text)
    if found:
        return f"+{found.group(1)}: exists already; leave the plus sign out"
    return _wrong_value(causes, text, schema) or _unknown_key(text, schema) or f"config: {first_line(error)}"


def no_such_key(name: str, schema: type) -> str:
    """Say that a key does not exist, and which one may have been meant."""
    if name.startswith(("hydra.", "hydra/")):
        guess = closest(name, hydra_keys() if name[5] == "." else HYDRA_GROUPS)
        if guess and name.startswith(f"{guess}."):  # a key of a free mapping: hydra.launcher.n_jobs
            guess = None
        return f"{name}: no such key" + (f"; did you mean {guess}?" if guess else "; --cfg hydra prints all of Hydra's")
    if schema is not TrainSettings and name in {*TRAINING_ONLY, *(key for key, *_ in known_keys(TrainSettings))}:
        return f"{name}: a key of trim-train, which trim-select does not have"
    parts = {spec.name for spec in dataclasses.fields(schema)} | {*RECIPES}
    guess = closest(name, [*(key for key, *_ in known_keys(schema)), *(group for group in GROUPS if group in parts)])
    return f"{name}: no such key" + (f"; did you mean {guess}?" if guess else "; --cfg job prints all keys")


@functools.cache
def hydra_keys() -> tuple[str, ...]:
    """Dotted keys of Hydra's own config: its leaves, and the sections at its top."""
    leaves = (key for key, *_ in known_keys(HydraConf, "hydra."))
    return (*leaves, *(f"hydra.{spec.name}" for spec in dataclasses.fields(HydraConf)))


def _unknown_option(error: MissingConfigException) -> str:
    """Say which options a group has."""
    missing, options = error.missing_cfg_file, list(error.options or ())
    if not missing or "/" not in missing:
        return first_line(error)
    if missing in EXTRAS:
        return f"{missing} is not installed; pip install 'trim-lightning[{EXTRAS[missing]}]'"
    group, _, option = missing.rpartition("/")
    hint = suggest(option, options, f"{group}=")
    return f"{group}={option}: no such option; {group} has {', '.join(options)}{hint}"


def _wrong_value(causes: Sequence[BaseException], text: str, schema: type) -> str | None:
    """Say what a key's value must be, if a value is the trouble."""
    found = re.search(r"full_key: (\S+)", text)
    key = found.group(1) if found else None
    for cause in causes:
        if isinstance(cause, MissingMandatoryValue):
            name = key or str(cause).split(":")[-1].strip()
            return f"{name}: a value is needed; give {name}=..."
        if isinstance(cause, InterpolationResolutionError | InterpolationKeyError):
            reason = first_line(cause).removeprefix("KeyError raised while resolving interpolation: ")
            return f"{key or 'config'}: {reason}; give the value itself, or define what it refers to"
    if key is None or not any(isinstance(cause, ValidationError) for cause in causes):
        return None
    given = re.search(rf"Error merging override \+*({re.escape(key)}\S*=.*)", text)
    kind = _kind_of(key, schema)
    return f"{given.group(1) if given else key}: " + (f"must be {kind}" if kind else first_line(causes[-1]))


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _kind_of(key: str, schema: type) -> str | None:
    """What a key's type permits, in the user's words."""
    kind: Any = schema
    for part in key.split("."):
        if not dataclasses.is_dataclass(kind):
            return None
        kind = typing.get_type_hints(kind).get(part)
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    optional = isinstance(kind, types.UnionType)
    (kind,) = options if optional and len(options) == 1 else (kind,)
    origin = typing.get_origin(kind)
    words = KINDS.get(kind) or {list: "a list, e.g. [a,b]", dict: "a mapping, e.g. {key: value}"}.get(origin or kind)
    return f"{words} or null" if words and optional else words


def _unknown_key(text: str, schema: type) -> str | None:
    """Suggest the key that was meant."""
    patterns = (
        r"Could not (?:override|delete from config\.) '([^']+)'",
        r"Key '([^']+)' (?:is not in struct|not in '[^']*')",
    )
    found = next((match for pattern in patterns for match in [re.search(pattern, text)] if match), None)
    if not found:
        return None
    name = found.group(1)
    full = re.search(r"full_key: (\S+)", text)
    return no_such_key(full.group(1) if full and full.group(1).endswith(name) else name, schema)


def closest(name: str, keys: Sequence[str]) -> str | None:
    """The known key nearest to a mistyped one: among its siblings, else by the whole name, else by its last part."""
    group, _, last = name.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in keys if group and key.rpartition(".")[0] == group]
    if siblings:
        near = nearest(last, siblings)
        return f"{group}.{near}" if near else None
    endings = {key.rpartition(".")[2] for key in keys}
    if group or name not in endings:
        near = nearest(name, [key for key in keys if ("." in key) == bool(group)], 0.75)
        if near or group:
            return near
    near = nearest(name, endings, 0.8)
    return " or ".join(key for key in keys if near and key.endswith(f".{near}")) or None
