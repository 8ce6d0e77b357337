"""TRIM with what responses teach: token classes matched, nearest by density, and For-Value's alignment, in one pass.

Our choice; docs/results/value.md has what it is chosen by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.methods.shared import usable_groups
from trim_lightning.methods.trim import TrimSelector
from trim_lightning.selection.ranking import ScoreTable, rank_round_robin
from trim_lightning.settings.key import key
from trim_lightning.settings.schema import SelectSettings
from trim_lightning.stages.passes import target_tokens
from trim_lightning.stages.response_parts import densities, mean_alignments
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import Entry
from trim_lightning.tokens.tokenized import TokenSequence

PARTS = ("trim", "density", "alignment")  # in the order of the weights


@dataclass
class TrimPlusSelector(TrimSelector):
    """The weighted sum of three scores, each standardised over the pool: mean 0, standard deviation 1.

    - ``trim``: TRIM's, as ``saliency``, ``fingerprint``, ``fallback`` and ``pooler`` set it.
    - ``density``: what single targets give to the record, to which its response's mean state is near, discounted by how
      many other records are as near (KNN-KDE; see `trim_lightning.trim.density`).
    - ``alignment``: how far a training step for a token of its response would go the way that the targets ask, seen at
      the output embedding, the mean over its tokens (For-Value; see `trim_lightning.trim.alignment`).

    All three are read off one pass over the pool; a record without a response has no score. The scorer is not warmed up
    by default, for nothing was gained by it.
    """

    use_warmup: bool = key(False, "score with the warmed-up model, if the warmup group is enabled")
    trim_weight: float = key(1.0, "weight of TRIM's standardised score", low=0)
    density_weight: float = key(1.0, "weight of the standardised share that near targets give", low=0)
    alignment_weight: float = key(1.0, "weight of the standardised alignment with the targets' gradient", low=0)

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each of `PARTS`."""
        return {part: getattr(self, f"{part}_weight") for part in PARTS}

    def check(self) -> None:
        """See `Selector`: some part must weigh something."""
        if not any(self.weights.values()):
            raise UserError(
                f"{', '.join(f'method.{part}_weight=0' for part in PARTS)}: nothing is left to score by; give "
                "one of them a weight above 0"
            )

    def warms_up(self, settings: SelectSettings) -> bool:
        """See `Selector`."""
        return settings.warmup.enabled and self.use_warmup

    def response_targets(self, task: SelectionTask) -> dict[str, list[TokenSequence]]:
        """Group name to those of its targets that have a response.

        Raises:
            UserError: if a group has none.
        """
        assert task.targets is not None
        targets, _ = target_tokens(task)
        responses = targets.content_lengths("response")
        groups = usable_groups(task, lambda row: responses[row] > 0, "no response", whatever_scope=True)
        without = sum(map(len, task.targets.groups.values())) - sum(map(len, groups.values()))
        if without:
            task.ledger.warn(
                f"target: {without} of {len(responses)} targets have no response: they count in TRIM's part of the "
                "score, not in density and alignment"
            )
        self._answered = groups
        return {group: [targets[row] for row in rows] for group, rows in groups.items()}

    def _pool(self, task: SelectionTask, passes: Sequence[Entry]) -> ScoreTable:
        """TRIM's table with the sums in place of its scores, and the parts beside them."""
        table = super()._pool(task, passes)
        size, (scored,) = len(task.pool), passes
        alignment = mean_alignments(self._passed, size)
        density = densities(task, self._passed, scored, self._signals_entry, self._answered)
        own = table.groups or {"": table.score}
        parts = {group: standardised(np.stack([own[group], density[group], alignment[group]])) for group in own}
        weights = np.array(list(self.weights.values()))
        whole = {group: (weights @ values).astype(np.float32) for group, values in parts.items()}
        aggregate = task.settings.target.aggregate
        scores, shown = aggregated(whole, parts, aggregate)
        named = {group: values for group, values in whole.items() if group}
        self._group_scores = named
        return replace(
            table,
            score=scores,
            groups=named,
            order=rank_round_robin(list(named.values())) if named and aggregate == "round_robin" else None,
            parts={part: values.astype(np.float32) for part, values in zip(PARTS, shown, strict=True)},
        )


def standardised(parts: NDArray[np.floating]) -> NDArray[np.float64]:
    """``[parts, records]`` scores with mean 0 and standard deviation 1, or all 0 where they are equal.

    Of the records that have all parts; the others get NaN.
    """
    known = np.isfinite(parts).all(0)
    found = np.full(parts.shape, np.nan)
    if known.any():
        values = parts[:, known].astype(np.float64)
        spread = values.std(1, keepdims=True)
        found[:, known] = (values - values.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)
    return found


def aggregated(
    whole: Mapping[str, NDArray[np.float32]], parts: Mapping[str, NDArray[np.float64]], how: str
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """One score a record ``[records]`` and its parts ``[parts, records]`` of those of several groups.

    As `trim_lightning.trim.pooling.aggregate_groups`: the mean of all, or all of the best group's.
    """
    scores, stacked = np.stack(list(whole.values())), np.stack(list(parts.values()))  # [groups, (parts,) records]
    if how == "mean":
        return scores.mean(0), stacked.mean(0)
    best = np.where(np.isnan(scores), -np.inf, scores).argmax(0)
    records = np.arange(scores.shape[1])
    return scores[best, records], stacked[best, :, records].T
