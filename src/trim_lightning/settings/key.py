"""How a key is declared, with default, bounds and meaning, and the checks that follow from that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from trim_lightning.errors import UserError, suggest


def key(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    names: bool = False,
    fields: bool = False,
) -> Any:
    """Declare one config key.

    Args:
        default: The default value; a ``dict`` or ``list`` is copied for every instance.
        meaning: One line for the key reference.
        choices: The permitted strings, if it is a choice.
        low: The smallest permitted number.
        above: A number that the value must exceed.
        high: The largest permitted number.
        names: A list of names is permitted besides the choices.
        fields: One name or a list of them is permitted.
    """
    metadata = {
        "fields": fields,
        "meaning": meaning,
        "choices": choices,
        "low": low,
        "above": above,
        "high": high,
        "names": names,
    }
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check(settings: Any, prefix: str = "") -> None:
    """Check choices and bounds of every key, recursively.

    Raises:
        UserError: naming the key, the value and what is permitted.
    """
    for spec in dataclasses.fields(settings):
        value, name = getattr(settings, spec.name), f"{prefix}{spec.name}"
        if dataclasses.is_dataclass(value):
            check(value, f"{name}.")
            continue
        if value is None or not spec.metadata:
            continue
        choices, low, above, high = (spec.metadata[part] for part in ("choices", "low", "above", "high"))
        if spec.metadata["names"]:
            check_names(name, value, choices)
            continue
        if spec.metadata["fields"]:
            listed = [value] if isinstance(value, str) else value
            if not isinstance(listed, list) or not listed or not all(isinstance(item, str) and item for item in listed):
                raise UserError(f"{name}={value}: must be a name, or a list of names such as [one,two]")
            continue
        if choices and value not in choices:
            raise UserError(f"{name}={value}: must be one of {', '.join(choices)}{suggest(str(value), choices)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if value != value or value in (float("inf"), float("-inf")):
            raise UserError(f"{name}={value}: must be a finite number")
        if low is not None and value < low:
            raise UserError(f"{name}={value}: must be at least {low}")
        if above is not None and value <= above:
            raise UserError(f"{name}={value}: must be above {above}")
        if high is not None and value > high:
            raise UserError(f"{name}={value}: must be at most {high}")


def check_names(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Check a value that is a choice or a list of names.

    Raises:
        UserError: naming the key, the value and what is permitted.
    """
    listed = isinstance(value, list) and value and all(isinstance(item, str) and item for item in value)
    if not listed and value not in choices:
        hint = suggest(value, choices) if isinstance(value, str) else ""
        permitted = f"{', '.join(choices)} or a list of names such as [q_proj,v_proj]"
        raise UserError(f"{name}={value}: must be {permitted}{hint}")


def known_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any], Any]]:
    """Yield ``(dotted key, metadata, default)`` of every leaf of a settings class."""
    instance = schema()
    for spec in dataclasses.fields(schema):
        value, name = getattr(instance, spec.name), f"{prefix}{spec.name}"
        if dataclasses.is_dataclass(value):
            yield from known_keys(type(value), f"{name}.")
        else:
            yield name, spec.metadata, value
