"""Candidate formulas for scoring a record against targets, from one forward pass (`value_features`).

Each gives ``[records]`` scores of the pool against the targets of one task, NaN for a record without a response token.
They are hypotheses; what the instrument finds of them stands in docs/results/value.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trim_lightning.models.precision import resolve_dtype
from trim_lightning.trim.fingerprints import TargetTokens, build_bank, unit
from trim_lightning.trim.matching import Matcher
from trim_lightning.trim.pooling import penalise, pool
from value_aggregates import AGGREGATES, aggregate
from value_features import ResponseTokens

Floats = NDArray[np.float64]
SKETCH = 64  # numbers that a state and an error are each projected to
FLOOR = 1e-3  # least weight of a token that is weighed by its error


@dataclass(frozen=True)
class Pass:
    """The pool's response tokens, ready for formulas.

    Attributes:
        tokens: See `ResponseTokens`.
        embeddings: ``[vocabulary, hidden]`` input embeddings, for the nearest class of one without a fingerprint.
        alignments: What `alignment` computed, by targets.
    """

    tokens: ResponseTokens
    embeddings: Tensor
    alignments: dict[int, Floats] = field(default_factory=dict, repr=False)

    @cached_property
    def own(self) -> Tensor:
        """``[tokens, hidden]`` float32."""
        return torch.from_numpy(np.asarray(self.tokens.own, dtype=np.float32))

    @cached_property
    def predicting(self) -> Tensor:
        """``[tokens, hidden]`` float32."""
        return torch.from_numpy(np.asarray(self.tokens.predicting, dtype=np.float32))

    @cached_property
    def gradient(self) -> Tensor:
        """``[tokens, hidden]`` float32."""
        return torch.from_numpy(np.asarray(self.tokens.gradient, dtype=np.float32))

    @cached_property
    def projections(self) -> tuple[Tensor, Tensor]:
        """R1 and R2, each ``[hidden, 64]``, normal numbers with variance 1/64."""
        generator = torch.Generator().manual_seed(0)
        hidden = self.embeddings.shape[1]
        first = torch.randn(hidden, SKETCH, generator=generator) / SKETCH**0.5
        return first, torch.randn(hidden, SKETCH, generator=generator) / SKETCH**0.5

    def alignment(self, targets: ResponseTokens) -> Floats:
        """`head_alignment` with these targets, ``[records]``, in the precision that models have here; computed once."""
        if id(targets) not in self.alignments:
            dtype = resolve_dtype("auto")
            states, wanted = (torch.from_numpy(np.asarray(part)).to(dtype)
                              for part in (self.tokens.predicting, targets.predicting))  # fmt: skip
            self.alignments[id(targets)] = head_alignment(
                states, torch.from_numpy(np.asarray(self.tokens.token_ids)), np.asarray(self.tokens.offsets), wanted,
                torch.from_numpy(np.asarray(targets.token_ids)), self.embeddings.to(dtype),
            )  # fmt: skip
        return self.alignments[id(targets)]

    def states(self, which: str) -> Tensor:
        """``own`` or ``next`` (the state that predicts the token)."""
        return self.own if which == "own" else self.predicting

    @cached_property
    def sketches(self) -> Tensor:
        """``[records, 64 * 64]`` unit float32, see `sketch`."""
        return sketch(self.tokens, self.predicting, self.gradient, self.projections)


def weights_of(tokens: ResponseTokens, how: str) -> Tensor:
    """``[tokens]`` float32: ``uniform``, ``attention`` (TRIM's), ``error`` (1 - p(y)) or ``both`` multiplied."""
    error = np.maximum(1 - np.asarray(tokens.probability, dtype=np.float32), FLOOR)
    attention = np.asarray(tokens.attention, dtype=np.float32)
    named = {"uniform": np.ones_like(error), "attention": attention, "error": error, "both": attention * error}
    return torch.from_numpy(named[how])


@dataclass(frozen=True)
class Fingerprints:
    """TRIM on response tokens, with its parts as choices.

    Attributes:
        states: ``own`` (TRIM: the state at the token) or ``next`` (the state that predicts it).
        saliency: Weights of the targets' tokens, see `weights_of`.
        pooler: One of the package's poolers, or ``sum``.
        token_weight: Weights of the candidates' tokens: ``uniform`` or ``error``.
        centre: Take the mean state off: ``none``, ``pool`` (of all tokens) or ``class`` (of the token's class, where it
            has at least 20 tokens in the pool).
        whiten: Divide by the standard deviation along so many principal directions of the pool; None does not.
        single: Match single targets and take the best, instead of one bank of all.
    """

    states: str = "own"
    saliency: str = "attention"
    pooler: str = "mean_max_coverage"
    token_weight: str = "uniform"
    centre: str = "none"
    whiten: int | None = None
    single: bool = False

    def __call__(self, candidates: Pass, targets: ResponseTokens) -> Floats:
        """Scores ``[records]`` of the pool."""
        if self.single:
            once = replace(self, single=False)
            each = [once(candidates, targets.take(np.array([row]))) for row in range(len(targets))]
            return np.stack(each).max(0)
        wanted = torch.from_numpy(
            np.asarray(targets.own if self.states == "own" else targets.predicting, dtype=np.float32)
        )
        have, wanted = self._moved(candidates, targets, wanted)
        ids = torch.from_numpy(np.asarray(targets.token_ids))
        bank = build_bank([TargetTokens(ids, wanted, weights_of(targets, self.saliency))])
        matcher = Matcher.prepare(bank, candidates.embeddings)
        token_ids = torch.from_numpy(np.asarray(candidates.tokens.token_ids))
        similarity, match = matcher.match(token_ids, unit(have))
        direct = (match == token_ids).numpy()
        penalised = penalise(similarity.double().numpy(), direct)
        weights = None if self.token_weight == "uniform" else weights_of(candidates.tokens, self.token_weight).numpy()
        lengths = candidates.tokens.lengths
        if self.pooler == "sum":
            mean = pool(penalised, direct, lengths, name="mean", token_weights=weights).score
            return mean * np.log1p(lengths)
        return pool(penalised, direct, lengths, name=self.pooler, token_weights=weights).score

    def _moved(self, candidates: Pass, targets: ResponseTokens, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """States of pool and targets after centring and whitening."""
        have = candidates.states(self.states)
        if self.centre == "none" and self.whiten is None:
            return have, wanted
        mean = have.mean(0)
        if self.centre == "class":
            ids, theirs = (torch.from_numpy(np.asarray(part.token_ids)) for part in (candidates.tokens, targets))
            size = len(candidates.embeddings)
            count = torch.bincount(ids, minlength=size)
            sums = torch.zeros(size, have.shape[1]).index_add_(0, ids, have)
            means = torch.where((count >= 20)[:, None], sums / count.clamp(min=1)[:, None], mean)
            have, wanted = have - means[ids], wanted - means[theirs]
        else:
            have, wanted = have - mean, wanted - mean
        if self.whiten is not None:
            sample = have[torch.randperm(len(have), generator=torch.Generator().manual_seed(0))[:20_000]]
            _, spread, directions = torch.linalg.svd(sample, full_matrices=False)
            turn = directions[: self.whiten].T / spread[: self.whiten]
            have, wanted = have @ turn, wanted @ turn
        return have, wanted


def sketch(tokens: ResponseTokens, states: Tensor, gradients: Tensor, projections: tuple[Tensor, Tensor]) -> Tensor:
    """``phi = sum_k (R1 h_k) (x) (R2 g_k)`` of each record, ``[records, 64 * 64]`` float32 of unit length.

    The gradient of a last linear layer (the output embedding, seen through itself), projected on both sides.
    """
    left, right = states @ projections[0], gradients @ projections[1]
    rows = []
    for start, end in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True):
        rows.append((left[start:end].T @ right[start:end]).flatten())
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1, eps=1e-12)


def mean_states(tokens: ResponseTokens, states: Tensor) -> Tensor:
    """``[records, hidden]`` float32: the mean state at each record's response tokens."""
    owner = torch.from_numpy(tokens.owner)
    sums = torch.zeros(len(tokens), states.shape[1]).index_add_(0, owner, states)
    return sums / torch.from_numpy(tokens.lengths).clamp(min=1)[:, None]


@dataclass(frozen=True)
class ByTarget:
    """Cosine of one vector a record with that of each target, as one score.

    Attributes:
        vectors: ``gradients`` (forward-only, of the head, see `sketch`) or ``states`` (`mean_states`, centred by the
            pool's mean).
        how: See `value_aggregates.aggregate`.
    """

    vectors: str = "gradients"
    how: str = "mean"

    def __call__(self, candidates: Pass, targets: ResponseTokens) -> Floats:
        """Scores ``[records]`` of the pool."""
        if self.vectors == "gradients":
            states, gradients = (
                torch.from_numpy(np.asarray(part, dtype=np.float32)) for part in (targets.predicting, targets.gradient)
            )
            have, wanted = candidates.sketches, sketch(targets, states, gradients, candidates.projections)
        else:
            own = torch.from_numpy(np.asarray(targets.own, dtype=np.float32))
            centre = candidates.own.mean(0)
            have = unit(mean_states(candidates.tokens, candidates.own) - centre)
            wanted = unit(mean_states(targets, own) - centre)
        cosines = (have @ wanted.T).double().numpy()
        cosines[candidates.tokens.lengths == 0] = np.nan
        return aggregate(cosines, have.numpy(), self.how)


def head_alignment(
    states: Tensor, following: Tensor, offsets: NDArray[np.int64], wanted: Tensor, answers: Tensor, weight: Tensor
) -> Floats:
    """``sum_k h_k^T M e_k`` of each record, ``M = sum_j h_j e_j^T`` over the targets' tokens (For-Value, 2508.10180).

    The inner product of two whole gradients of an output embedding.

    Args:
        states: ``[tokens, hidden]`` that predict the pool's response tokens, record after record.
        following: ``[tokens]`` those tokens.
        offsets: ``[records + 1]`` where each record's tokens begin.
        wanted: ``[target tokens, hidden]``.
        answers: ``[target tokens]``.
        weight: ``[vocabulary, hidden]`` output embedding.
    """
    errors = -torch.softmax((wanted @ weight.T).float(), dim=-1)
    errors[torch.arange(len(answers)), answers] += 1
    columns = (wanted.float().T @ errors).to(weight.dtype)
    values = []
    for piece, tokens in zip(states.split(512), following.split(512), strict=True):
        aligned = (piece @ columns).float()
        chances = torch.softmax((piece @ weight.T).float(), dim=-1)
        values.append(aligned.gather(1, tokens[:, None]).squeeze(1) - chances.mul_(aligned).sum(1))
    reached = np.concatenate([[0.0], np.cumsum(torch.cat(values).double().numpy())])
    sums: Floats = reached[offsets[1:]] - reached[offsets[:-1]]
    return sums


@dataclass(frozen=True)
class ForValue:
    """Alignment of whole head gradients, `head_alignment`.

    Attributes:
        divided: Take the mean over the record's response tokens; the paper's is the sum.
    """

    divided: bool = False

    def __call__(self, candidates: Pass, targets: ResponseTokens) -> Floats:
        """Scores ``[records]`` of the pool."""
        tokens = candidates.tokens
        sums = candidates.alignment(targets)
        return np.where(tokens.lengths > 0, sums / np.maximum(tokens.lengths, 1) if self.divided else sums, np.nan)


@dataclass(frozen=True)
class Sum:
    """Standardised scores of two candidates, added."""

    first: Callable[[Pass, ResponseTokens], Floats]
    second: Callable[[Pass, ResponseTokens], Floats]

    def __call__(self, candidates: Pass, targets: ResponseTokens) -> Floats:
        """Scores ``[records]`` of the pool."""
        return standard(self.first(candidates, targets)) + standard(self.second(candidates, targets))


def standard(scores: Floats) -> Floats:
    """Scores with mean 0 and standard deviation 1; NaN stays."""
    spread = np.nanstd(scores)
    whole: Floats = (scores - np.nanmean(scores)) / (spread if spread > 0 else 1)
    return whole


def record_loss(candidates: Pass, targets: ResponseTokens) -> Floats:
    """Mean loss of the record's response tokens, in nats."""
    tokens = candidates.tokens
    losses = -np.log(np.maximum(np.asarray(tokens.probability, dtype=np.float64), 1e-30))
    sums = np.bincount(tokens.owner, losses, minlength=len(tokens))
    return np.where(tokens.lengths > 0, sums / np.maximum(tokens.lengths, 1), np.nan)


def record_length(candidates: Pass, targets: ResponseTokens) -> Floats:
    """Response tokens."""
    lengths = candidates.tokens.lengths.astype(np.float64)
    return np.where(lengths > 0, lengths, np.nan)


def named() -> Iterator[tuple[str, Callable[[Pass, ResponseTokens], Floats]]]:
    """All candidates with their names, one change from TRIM on responses at a time, then what is built of several."""
    plain = Fingerprints()
    mean = replace(plain, pooler="mean")
    yield "trim, responses", plain
    for saliency in ("uniform", "error", "both"):
        yield f"trim, responses, {saliency} saliency", replace(plain, saliency=saliency)
    yield "trim, responses, mean", mean
    for saliency in ("uniform", "error", "both"):
        yield f"trim, responses, mean, {saliency} saliency", replace(mean, saliency=saliency)
    yield "trim, responses, mean, error weight", replace(mean, token_weight="error")
    yield "trim, responses, mean, error both", replace(mean, saliency="error", token_weight="error")
    yield "trim, responses, mean times log length", replace(mean, pooler="sum")
    yield "trim, responses, mean, single targets", replace(mean, single=True)
    for centre in ("pool", "class"):
        yield f"trim, responses, mean, centred by {centre}", replace(mean, centre=centre)
    for width in (128, 256):
        yield f"trim, responses, mean, whitened {width}", replace(mean, centre="pool", whiten=width)
    following = replace(mean, states="next")
    yield "next-token classes, mean", following
    yield "next-token classes, mean, uniform saliency", replace(following, saliency="uniform")
    yield "next-token classes, mean, error both", replace(following, saliency="error", token_weight="error")
    yield "next-token classes, mean, centred by pool", replace(following, centre="pool")
    yield "next-token classes, mean, centred by class", replace(following, centre="class")
    for vectors, title in (("gradients", "head gradients"), ("states", "mean states")):
        for how in AGGREGATES:
            yield f"{title}, {how}", ByTarget(vectors, how)
    yield "trim mean + head gradients", Sum(replace(mean, saliency="uniform"), ByTarget())
    yield "next-token classes + head gradients", Sum(replace(following, saliency="uniform"), ByTarget())
    yield "loss", record_loss
    yield "response length", record_length
    yield "for-value", ForValue()
    yield "for-value, mean", ForValue(divided=True)
