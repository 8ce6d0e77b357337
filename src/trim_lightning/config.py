"""Between Hydra and the rest: schemas, where ``conf/`` is, and errors in the user's words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from trim_lightning.errors import UserError
from trim_lightning.settings import SelectSettings, known_keys

Settings = TypeVar("Settings")
GROUPS = (
    "model", "pool", "target", "warmup", "saliency", "fallback", "pooler", "method", "selection", "trainer",
    "logger", "paths", "experiment", "debug",
)  # fmt: skip


def config_directory() -> Path:
    """The folder of YAML files: inside the wheel, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parents[1] / "conf"):
        if folder.is_dir():
            return folder
    raise UserError("the installation is incomplete: it has no conf folder; install trim-lightning again")


def register_schemas() -> None:
    """Give Hydra the types and defaults of every key."""
    ConfigStore.instance().store(name="select_schema", node=SelectSettings)


def to_settings(config: DictConfig, kind: type[Settings]) -> Settings:
    """Turn a composed config into plain settings objects.

    Raises:
        UserError: for a missing value or one of the wrong type.
    """
    try:
        settings = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None
    assert isinstance(settings, kind)
    return settings


def compose_select(overrides: Sequence[str]) -> SelectSettings:
    """Compose the settings of a selection from overrides, without running Hydra's application.

    ``paths.output_dir`` must be among the overrides.

    Raises:
        UserError: for anything wrong with the overrides.
    """
    register_schemas()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            config = compose("select", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from None
    return to_settings(config, SelectSettings)


def explain(error: BaseException) -> str:
    """One line on what is wrong with the overrides or the config, with the likely remedy."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = "\n".join(str(cause) for cause in causes)
    if isinstance(error, MissingConfigException):
        return _unknown_option(text)
    for cause in causes:
        if isinstance(cause, MissingMandatoryValue):
            key = re.search(r"full_key: (\S+)", str(cause))
            name = key.group(1) if key else str(cause).split(":")[-1].strip()
            return f"{name}: a value is needed; give {name}=..."
        if isinstance(cause, InterpolationResolutionError):
            return f"config: {first_line(cause)}"
    unknown = _unknown_key(text)
    if unknown:
        return unknown
    key = re.search(r"full_key: (\S+)", text)
    for cause in reversed(causes):
        line = first_line(cause)
        if isinstance(cause, OmegaConfBaseException):
            return f"{key.group(1)}: {line}" if key else line
    if isinstance(error, ConfigCompositionException):
        return first_line(error)
    return f"config: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """First line of an exception's text."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(":. ") if lines else type(error).__name__


def _unknown_option(text: str) -> str:
    """Say which options a group has."""
    found = re.search(r"Could not find '(.+?)/(.+?)'", text)
    if not found:
        return first_line(Exception(text))
    group, option = found.groups()
    options = re.findall(r"^\t(\S+)", text, flags=re.MULTILINE)
    guess = difflib.get_close_matches(option, options, n=1)
    hint = f"; did you mean {group}={guess[0]}?" if guess else ""
    return f"{group}={option}: no such option; {group} has {', '.join(options)}{hint}"


def _unknown_key(text: str) -> str | None:
    """Suggest the key that was meant."""
    patterns = (
        r"Could not override '([^']+)'",
        r"Could not append to config\. (?:The item|An item) is already at '([^']+)'",
        r"Key '([^']+)' (?:is not in struct|not in '[^']*')",
    )
    found = next((match for pattern in patterns for match in [re.search(pattern, text)] if match), None)
    if not found or ("not in" not in text and "No match" not in text):
        return None
    name = found.group(1)
    full = re.search(r"full_key: (\S+)", text)
    if full and full.group(1).endswith(name):
        name = full.group(1)
    keys = [key for key, *_ in known_keys(SelectSettings)]
    guess = closest(name, [*keys, *GROUPS])
    hint = f"; did you mean {guess}?" if guess else "; --help lists the keys that people change"
    return f"{name}: no such key{hint}"


def closest(name: str, keys: Sequence[str]) -> str | None:
    """The known key nearest to a mistyped one: by the whole name, else by its last part."""
    found = difflib.get_close_matches(name, keys, n=1, cutoff=0.75)
    if found:
        return found[0]
    last = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}
    prefix = name.rsplit(".", 1)[0]
    siblings = [key for key in keys if "." in name and key.startswith(f"{prefix}.")]
    found = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if found:
        return found[0]
    found = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.75)
    return last[found[0]] if found else None


def as_container(config: DictConfig) -> dict[str, Any]:
    """A config as plain containers, for tracking."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}
