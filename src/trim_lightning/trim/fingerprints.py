"""The fingerprint bank: one unit vector for every token class of the target set, and how far apart they lie."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class TargetTokens(NamedTuple):
    """The scoped tokens of one target example.

    Attributes:
        token_ids: ``[scoped]`` int64 token classes.
        hidden: ``[scoped, hidden]`` last hidden states, after the final norm.
        saliency: ``[scoped]`` alpha.
    """

    token_ids: Tensor
    hidden: Tensor
    saliency: Tensor


@dataclass(frozen=True)
class FingerprintBank:
    """Fingerprints of the token classes of a target set.

    Attributes:
        token_ids: ``[classes]`` int64, ascending.
        vectors: ``[classes, hidden]`` float32 unit vectors.
        idf: ``[classes]`` float32, ``log((1+N)/(1+df)) + 1`` over the N targets. It cancels inside a unit
            vector under cosine; it acts as the pooling weight ``pooler.token_weight=idf``.
        mass: ``[classes]`` float32, summed saliency.
        count: ``[classes]`` int64, occurrences.
        num_targets: N.
        token_class: ``own`` if the vectors are of the states at the tokens, ``next`` if of those before; see
            `class_states`.
        names: Token class to its text, for those who look at the bank; it decides nothing.
    """

    token_ids: Tensor
    vectors: Tensor
    idf: Tensor
    mass: Tensor
    count: Tensor
    num_targets: int
    settings: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict, repr=False)
    token_class: str = "own"

    def __len__(self) -> int:
        return int(self.token_ids.numel())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the names of ``fingerprints.safetensors``."""
        names = ("token_ids", "vectors", "idf", "mass", "count")
        return {name: getattr(self, name).contiguous() for name in names}

    def _repr_html_(self) -> str:
        """For notebooks: the ten classes with the most saliency."""
        rows = []
        for place in torch.argsort(-self.mass, stable=True)[:10].tolist():
            token = int(self.token_ids[place])
            name = html.escape(self.names.get(token, str(token)))
            rows.append(
                f"<tr><th><code>{name}</code></th><td>{self.mass[place]:.2f}</td>"
                f"<td>{int(self.count[place])}</td><td>{self.idf[place]:.2f}</td></tr>"
            )
        return (
            f"<p>{len(self):,} token classes of {self.num_targets:,} targets; the heaviest:</p><table><thead><tr>"
            f"<th>token</th><th>mass</th><th>occurrences</th><th>idf</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )


def unit(hidden: Tensor) -> Tensor:
    """L2-normalise ``[..., hidden]`` in float32."""
    return normalize(hidden.float(), dim=-1, eps=1e-12)


def class_states(hidden: Tensor, token_class: str) -> Tensor:
    """The state that stands for each token of whole sequences, ``[..., seq, hidden]``.

    Args:
        hidden: ``[..., seq, hidden]`` last hidden states.
        token_class: ``own`` (paper) leaves them; ``next`` (our choice, after For-Value, arXiv 2508.10180) takes for
            each token the state one place before, which predicts it. A sequence's first token, which nothing predicts,
            keeps its own.

    Raises:
        ValueError: for another token class.
    """
    if token_class == "own":
        return hidden
    if token_class != "next":
        raise ValueError(f"unknown token class {token_class!r}")
    return torch.cat([hidden[..., :1, :], hidden[..., :-1, :]], dim=-2)


def build_bank(targets: Iterable[TargetTokens], token_class: str = "own") -> FingerprintBank:
    """Build the bank: ``f_t = sum(alpha h) / |sum(alpha h)|`` over the occurrences of class t (paper).

    Sums run in float64 on the CPU, so that the result does not depend on the order of the targets by more
    than rounding to float32.

    Args:
        targets: The targets; those without scoped tokens count in N and add nothing.
        token_class: Which states theirs are, see `class_states`.

    Returns:
        The bank, possibly with no class.
    """
    examples = list(targets)
    if not examples:
        raise ValueError("no targets")
    token_ids = torch.cat([example.token_ids.cpu().long() for example in examples])
    hidden = torch.cat([unit(example.hidden).cpu() for example in examples]).double()
    saliency = torch.cat([example.saliency.cpu() for example in examples]).double()
    classes, place, count = torch.unique(token_ids, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(classes), hidden.shape[-1], dtype=torch.float64)
    sums.index_add_(0, place, hidden * saliency[:, None])
    mass = torch.zeros(len(classes), dtype=torch.float64).index_add_(0, place, saliency)
    document_frequency = torch.zeros(len(classes), dtype=torch.float64)
    for example in examples:
        document_frequency += torch.isin(classes, example.token_ids.cpu().long())
    return FingerprintBank(
        token_ids=classes,
        vectors=normalize(sums, dim=-1, eps=1e-30).float(),
        idf=inverse_document_frequency(document_frequency, len(examples)).float(),
        mass=mass.float(),
        count=count,
        num_targets=len(examples),
        token_class=token_class,
    )


def inverse_document_frequency(document_frequency: Tensor, num_targets: int) -> Tensor:
    """``idf_t = log((1+N)/(1+df_t)) + 1`` for ``[classes]`` document frequencies."""
    return math.log(1 + num_targets) - torch.log1p(document_frequency) + 1


def within_over_between(targets: Iterable[TargetTokens], bank: FingerprintBank) -> float | None:
    """Variability within classes over the distance between them, both as 1 - cosine (our choice).

    Within: the mean distance of a target token's unit state from its class's fingerprint, over classes that occur at
    least twice. Between: the mean distance of two fingerprints. Near 0 the states of a class have collapsed to one
    point, and similarity says little more than which class a token has; near 1 classes are no clusters.

    Returns:
        The ratio; None with fewer than two classes or without a class that occurs twice.
    """
    classes = len(bank)
    distances = []
    for target in targets:
        place = torch.searchsorted(bank.token_ids, target.token_ids.cpu().long())
        near = (unit(target.hidden).cpu().double() * bank.vectors[place].double()).sum(-1)
        distances.append((1 - near)[bank.count[place] > 1])
    found = torch.cat(distances) if distances else torch.empty(0)
    if classes < 2 or not len(found):
        return None
    # the mean over all pairs, without a matrix of them
    total = bank.vectors.double().sum(0).square().sum() - bank.vectors.double().square().sum()
    between = 1 - total / (classes * (classes - 1))
    return float(found.mean() / between) if between > 0 else None
