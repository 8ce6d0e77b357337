"""From the target pass to fingerprint banks: saliency, banks per group, and their file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trim_lightning.engine.target_pass import TargetSignals
from trim_lightning.settings.schema import SaliencySettings
from trim_lightning.tokens.tokenized import scope_mask
from trim_lightning.trim.fingerprints import (
    FingerprintBank,
    TargetTokens,
    build_bank,
    class_states,
    within_over_between,
)
from trim_lightning.trim.saliency import token_saliency


def save_banks(banks: Mapping[str, FingerprintBank], path: Path, settings: Mapping[str, object]) -> None:
    """Write banks to one safetensors file; the group name prefixes the tensors unless it is empty.

    The JSON-able settings are kept as text in the file's metadata.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{group}/{name}" if group else name: tensor
        for group, bank in banks.items()
        for name, tensor in bank.tensors().items()
    }
    counts = {group: bank.num_targets for group, bank in banks.items()}
    # one entry: safetensors writes several in no fixed order, and equal runs should give equal bytes
    described = json.dumps({**settings, "num_targets": counts}, sort_keys=True)
    save_file(tensors, str(path), metadata={"settings": described})


def load_banks(path: Path) -> dict[str, FingerprintBank]:
    """Read what `save_banks` wrote."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        settings = json.loads(file.metadata()["settings"])
        counts = settings.pop("num_targets")
        names = ("token_ids", "vectors", "idf", "mass", "count")
        return {
            group: FingerprintBank(
                **{name: file.get_tensor(f"{group}/{name}" if group else name) for name in names},
                num_targets=number,
                settings=settings,
                token_class=settings.get("token_class", "own"),
            )
            for group, number in counts.items()
        }


@dataclass(frozen=True)
class SalientTarget:
    """One target with its scaled saliency on the scoped tokens.

    Attributes:
        row: Place among the targets.
        token_ids: ``[seq]`` int64.
        scope: ``[seq]`` bool.
        row_saliency: ``[scoped]`` float32.
        column_saliency: ``[scoped]`` float32.
        saliency: ``[scoped]`` float32 alpha.
        hidden: ``[scoped, hidden]`` float32, see `class_states`.
        token_class: Which states these are.
    """

    row: int
    token_ids: Tensor
    scope: Tensor
    row_saliency: Tensor
    column_saliency: Tensor
    saliency: Tensor
    hidden: Tensor
    token_class: str = "own"


def weigh(
    signals: Iterable[TargetSignals], saliency: SaliencySettings, scope: str, token_class: str = "own"
) -> list[SalientTarget]:
    """Apply layer count, weights, scaling and scope to raw signals.

    The layers are the last ones that have softmax attention: as many as asked for, or all.
    """
    targets = []
    for signal in signals:
        mask = torch.from_numpy(scope_mask(signal.roles.numpy(), scope))
        row, column, alpha = token_saliency(
            signal.row_signal,
            signal.column_signal,
            mask,
            num_layers=min(saliency.num_layers, len(signal.row_signal)),
            row_weight=saliency.row_weight,
            column_weight=saliency.column_weight,
            normalize=saliency.normalize,
            probability=signal.probability,
            error_weight=saliency.error_weight,
        )
        hidden = class_states(signal.hidden, token_class)[mask]
        targets.append(SalientTarget(signal.row, signal.token_ids, mask, row, column, alpha, hidden, token_class))
    return targets


def banks_of(targets: Sequence[SalientTarget], groups: Mapping[str, Sequence[int]]) -> dict[str, FingerprintBank]:
    """One bank per target group, in the order of ``groups``: name to rows, ``{"": all rows}`` without groups."""
    token_class = targets[0].token_class if targets else "own"
    return {group: build_bank(tokens_of(targets, rows), token_class) for group, rows in groups.items()}


def tokens_of(targets: Sequence[SalientTarget], rows: Sequence[int]) -> list[TargetTokens]:
    """The scoped tokens of some targets; rows that could not be rendered are left out."""
    by_row = {target.row: target for target in targets}
    found = [by_row[row] for row in rows if row in by_row]
    return [TargetTokens(target.token_ids[target.scope], target.hidden, target.saliency) for target in found]


def separation(
    targets: Sequence[SalientTarget], groups: Mapping[str, Sequence[int]], banks: Mapping[str, FingerprintBank]
) -> float | None:
    """Mean of `within_over_between` over the groups that have it."""
    ratios = [within_over_between(tokens_of(targets, groups[group]), bank) for group, bank in banks.items()]
    known = [ratio for ratio in ratios if ratio is not None]
    return sum(known) / len(known) if known else None
