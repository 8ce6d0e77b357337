"""What is found out of a model by loading it: done first, so that a class is refused before any record is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trim_lightning.engine.devices import is_spread
from trim_lightning.errors import UserError
from trim_lightning.settings.schema import TuningSettings, WarmupSettings
from trim_lightning.stages.model import ModelHandle
from trim_lightning.store import Entry, StageKey


def look_at(handle: ModelHandle, tuning: TuningSettings | None = None, *, gradients: bool = False) -> Entry:
    """Load a model once, with its tokenizer, and note how its attention is read; later runs find that in the store.

    Whoever loads the model next is given the one that was looked at, unless each of several processes loads its own.

    Args:
        handle: The model.
        tuning: How LoRA is to be trained; None if it is not.
        gradients: True if gradients of single records are to be taken of it.

    Returns:
        An entry whose facts are those of a `Reading`, its ``way``, the model's ``class``, and what it is ``lacking``
        for LoRA.

    Raises:
        UserError: if the model cannot be loaded, looks ahead, wants more than a text, or lacks what ``tuning`` or
            ``gradients`` need.
    """
    wanted = tuning or WarmupSettings()
    choices = {"lora": wanted.lora_targets, "gradients": gradients}
    # not the handle's identity: a trainee and a scorer are one model here
    dtype = handle.number_format(f"torch.{handle.resolved_dtype}")
    key = StageKey("look", 1, choices, {"model": {"model": handle.source.digest, "dtype": dtype}})

    def build(directory: Path) -> Mapping[str, Any]:
        from trim_lightning.engine.gradients import check_layers
        from trim_lightning.models.load import keep_for_next, load_model
        from trim_lightning.models.lora import lora_targets
        from trim_lightning.models.reading import reading_of

        assert handle.tokenizer
        handle.before_load()
        model = load_model(handle.source, handle.dtype)
        targets, lacking = list[str](), ""
        try:
            targets = lora_targets(model, wanted)
        except UserError as error:  # no matter, if none is trained
            lacking = str(error).partition(": ")[2]
        if gradients:
            check_layers(model, targets)
        if not is_spread(handle.trainer):
            keep_for_next(model, handle.source, handle.dtype)
        reading = reading_of(model)
        return {"way": reading.way, "class": type(model).__name__, "lacking": lacking, **reading.facts}

    entry = handle.store.get(key, build)
    if tuning is not None and entry.facts["lacking"]:
        from trim_lightning.models.lora import key_of

        raise UserError(f"{key_of(tuning)}: {entry.facts['lacking']}")
    return entry
