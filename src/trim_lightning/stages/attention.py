"""Which layers' attention a selection reads, of a model in which not all layers have some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trim_lightning.engine.devices import is_divided
from trim_lightning.errors import UserError
from trim_lightning.settings.schema import SaliencySettings, SelectSettings
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Entry


def check_attention(look: Entry, settings: SelectSettings, name: str) -> None:
    """Refuse a model whose attention cannot be read as it is asked for, by what a look at it has shown.

    Raises:
        UserError: if saliency asks for attention and there is none, or if divided weights do not allow to read it.
    """
    attention_read(look, settings.saliency, name)
    if is_divided(settings.trainer):
        from trim_lightning.models.reading import refuse_divided

        refuse_divided(look.facts["way"], look.facts["class"])


def attention_read(signals: Entry, saliency: SaliencySettings, name: str) -> dict[str, Any]:
    """``attention`` for the manifest: the last ``layers`` with softmax attention that were read, ``of`` how many.

    Empty for a model in which every layer has it.

    Raises:
        UserError: if saliency asks for attention and the model has none that can be read.
    """
    softmax = signals.facts.get("softmax")
    if softmax is None:
        return {}
    layers = softmax["layers"][max(0, len(softmax["layers"]) - saliency.num_layers) :]
    if not layers and (saliency.row_weight or saliency.column_weight):
        raise UserError(
            f"model.path={name}: {softmax['why']}, so that saliency cannot be read; saliency=uniform gives every "
            "scoped token the same weight"
        )
    return {"attention": {"layers": layers, "of": softmax["of"]}}


def warn_of_layers(attention: Mapping[str, Any] | None, task: SelectionTask) -> None:
    """Say which layers were read if they are fewer than ``saliency.num_layers``."""
    wanted, name = task.settings.saliency.num_layers, task.scorer.source.name
    if attention is None or len(attention["layers"]) >= wanted:
        return
    if not attention["layers"]:
        if not task.settings.saliency.error_weight:
            task.ledger.warn(f"saliency: {name} has no attention to read, so that every scoped token weighs the same")
        return
    told = ", ".join(map(str, attention["layers"]))
    task.ledger.warn(
        f"saliency.num_layers={wanted}: {name} has softmax attention in {len(attention['layers'])} of its "
        f"{attention['of']} layers, which are read (counted from 0: {told})"
    )
