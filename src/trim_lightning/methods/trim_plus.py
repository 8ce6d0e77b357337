"""TRIM with what responses teach: token classes matched and For-Value's alignment, read off one pass.

Our choice; docs/results/value.md has what it is chosen by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.methods.trim import TrimSelector
from trim_lightning.selection.ranking import ScoreTable, rank_round_robin
from trim_lightning.settings.key import key
from trim_lightning.settings.schema import SelectSettings
from trim_lightning.stages.response_parts import densities
from trim_lightning.stages.task import SelectionTask
from trim_lightning.stages.token_scores import ScoredShard
from trim_lightning.store import Entry
from trim_lightning.tokens.tokenized import TokenizedRecords, TokenSequence, predicted_responses
from trim_lightning.trim.pooling import Pooled

PARTS = ("trim", "alignment", "density")
KEPT = (*Pooled._fields, "alignment")  # of every group while shards are read


@dataclass
class TrimPlusSelector(TrimSelector):
    """The weighted sum of scores, each standardised over the pool: mean 0, standard deviation 1.

    - ``trim``: TRIM's, as ``saliency``, ``fingerprint``, ``fallback`` and ``pooler`` set it.
    - ``alignment``: how far a training step for a token of its response would go the way that the targets ask, seen at
      the output embedding, the mean over its tokens unless ``length_exponent`` says otherwise (For-Value; see
      `trim_lightning.trim.alignment`).
    - ``density``, only with a weight: the square root of what single targets give to the record if its response's mean
      state is near, the less the more crowded it is there (KNN-KDE; see `trim_lightning.trim.density`). The root keeps
      one lonely record from outvoting the other parts.

    All are read off one pass over the pool. A record without a response has no score. The scorer is not warmed up by
    default: TRIM gained nothing by it.
    """

    use_warmup: bool = key(False, "score with the warmed-up model, if the warmup group is enabled")
    trim_weight: float = key(1.0, "weight of TRIM's standardised score", low=0)
    alignment_weight: float = key(1.0, "weight of the standardised alignment with the targets' gradient", low=0)
    density_weight: float = key(0.0, "weight of the standardised share that near targets give", low=0)

    length_exponent: float = key(
        1.0, "alignment: its sum over (response tokens) to this power; 1 is the mean, 0 For-Value's sum", low=0, high=1
    )

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each of `PARTS` that has one."""
        found = {part: getattr(self, f"{part}_weight") for part in PARTS}
        return {part: weight for part, weight in found.items() if weight}

    @property
    def keeps_states(self) -> bool:
        """See `TrimSelector`."""
        return self.density_weight > 0

    def scores_responses(self) -> bool:
        """See `Selector`."""
        return True

    def check(self) -> None:
        """See `Selector`: some part must weigh something."""
        if not self.weights:
            raise UserError(
                f"{', '.join(f'method.{part}_weight=0' for part in PARTS)}: nothing is left to score by; give "
                "one of them a weight above 0"
            )

    def warms_up(self, settings: SelectSettings) -> bool:
        """See `Selector`."""
        return settings.warmup.enabled and self.use_warmup

    def response_targets(self, task: SelectionTask, targets: TokenizedRecords) -> dict[str, list[TokenSequence]]:
        """Group name to those of its targets that have a response.

        Raises:
            UserError: if a group has none.
        """
        assert task.targets is not None
        all_groups = task.targets.groups
        groups = {group: [row for row in rows if has_response(targets[row])] for group, rows in all_groups.items()}
        for group in (group for group, rows in groups.items() if not rows):
            where = f"group {group!r} of the target set" if group else "the target set"
            raise UserError(
                f"target: {where} has no response token (absent, or cut off by max_length), by which method=trim_plus "
                "scores; give targets that have some, or use method=trim"
            )
        without = sum(map(len, all_groups.values())) - sum(map(len, groups.values()))
        if without:
            task.ledger.warn(
                f"target: {without} of {len(targets)} targets have no response token (absent, or cut off by "
                "max_length): they count in TRIM's part of the score alone"
            )
        self._answered = groups
        return {group: [targets[row] for row in rows] for group, rows in groups.items()}

    def _keep(self, shard: ScoredShard, pooled: Mapping[str, Pooled]) -> None:
        """Keep `KEPT` of every group."""
        assert shard.whole is not None
        lengths = shard.whole.responses.astype(np.float64)
        for place, (group, own) in enumerate(pooled.items()):
            alignment = shard.whole.mean_alignment[place] * lengths ** (1 - self.length_exponent)
            self._kept[group][:, shard.rows] = [*own, alignment]

    def _pool(self, task: SelectionTask, passes: Sequence[Entry]) -> ScoreTable:
        """TRIM's table with the sums in place of its scores, and the parts beside them."""
        size, (scored,) = len(task.pool), passes
        self._kept = {group: np.full((len(KEPT), size), np.nan, dtype=np.float32) for group in self._answered}
        table = super()._pool(task, passes)
        raw = {"trim": self._column("score"), "alignment": self._column("alignment")}
        if "density" in self.weights:
            shares = densities(task, self._passed, scored, self._signals_entry, self._answered)
            raw["density"] = {group: np.sqrt(values) for group, values in shares.items()}
        parts = {
            group: standardised(np.stack([raw[part][group] for part in self.weights])) for group in self._kept
        }  # [parts, records] each
        weights = np.array(list(self.weights.values()))
        whole = {group: (weights @ values).astype(np.float32) for group, values in parts.items()}
        named = {group: values for group, values in whole.items() if group}
        self._group_scores = named
        columns: dict[str, Any] = {"groups": named, "order": None}
        aggregate = task.settings.target.aggregate
        if named and aggregate == "round_robin":
            columns["order"] = rank_round_robin(list(named.values()))
        if aggregate == "mean":
            columns["score"] = np.stack(list(whole.values())).mean(0)
            shown = np.stack(list(parts.values())).mean(0)
        else:  # all columns of the group with the best sum
            scores = np.stack(list(whole.values()))
            best, records = np.where(np.isnan(scores), -np.inf, scores).argmax(0), np.arange(size)
            own = np.stack(list(self._kept.values()))[best, :, records].T  # [kept, records]
            columns |= dict(zip(KEPT[1:4], own[1:4], strict=True)) | {"score": scores[best, records]}
            shown = np.stack(list(parts.values()))[best, :, records].T
        del self._kept
        shown = shown.astype(np.float32)
        return replace(table, **columns, parts=dict(zip(self.weights, shown, strict=True)))

    def _column(self, name: str) -> dict[str, NDArray[np.float32]]:
        """By group, one of `KEPT`."""
        return {group: kept[KEPT.index(name)] for group, kept in self._kept.items()}


def has_response(target: TokenSequence) -> bool:
    """True if a target has a response token that something stands before."""
    return bool(predicted_responses(np.array(target.roles), np.array([len(target.roles)])).any())


def standardised(parts: NDArray[np.floating]) -> NDArray[np.float64]:
    """``[parts, records]`` scores with mean 0 and standard deviation 1, or all 0 where they are equal.

    Of the records that have all parts; the others get NaN.
    """
    known = np.isfinite(parts).all(0)
    found = np.full(parts.shape, np.nan)
    if known.any():
        values = parts[:, known].astype(np.float64)
        varies = values.max(1, keepdims=True) > values.min(1, keepdims=True)  # rounding gives equal ones a deviation
        spread = np.where(varies, values.std(1, keepdims=True), np.inf)
        found[:, known] = (values - values.mean(1, keepdims=True)) / spread
    return found
