"""Settings from overrides as on the command line, without a run of Hydra's application."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from trim_lightning.errors import UserError
from trim_lightning.settings.compose import composed, to_settings
from trim_lightning.settings.mistakes import explain
from trim_lightning.settings.schema import SelectSettings, TrainSettings

Settings = TypeVar("Settings")


def compose_settings(command: str, kind: type[Settings], overrides: Sequence[str]) -> Settings:
    """The settings of a command; ``paths.output_dir`` must be among the overrides.

    Raises:
        UserError: for anything wrong with the overrides.
    """
    try:
        config = composed(command, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: pool=null
        raise UserError(explain(error, kind)) from None
    return to_settings(config, kind)


def compose_select(overrides: Sequence[str]) -> SelectSettings:
    """The settings of a selection."""
    return compose_settings("select", SelectSettings, overrides)


def compose_train(overrides: Sequence[str]) -> TrainSettings:
    """The settings of a training."""
    return compose_settings("train", TrainSettings, overrides)
