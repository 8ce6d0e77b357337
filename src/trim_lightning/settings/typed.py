"""Settings that someone made in Python, held to the types that Hydra would hold them to."""

from __future__ import annotations

from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trim_lightning.errors import UserError, first_line
from trim_lightning.settings.key import check

Given = TypeVar("Given")


def checked(given: Given | None, usual: Given, name: str) -> Given:
    """Settings as given, or the usual ones; their types, choices and bounds are checked.

    Raises:
        UserError: for settings of another kind, or a value that is not permitted.
    """
    if given is None:
        return usual
    if not isinstance(given, type(usual)):
        raise UserError(f"{name}: this is a {type(given).__name__}; give {type(usual).__name__}(...)")
    try:
        typed: Given = OmegaConf.to_object(OmegaConf.structured(given))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {first_line(error)}") from None
    check(typed, f"{name}.")
    return typed
