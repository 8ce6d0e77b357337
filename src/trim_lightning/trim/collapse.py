"""How far apart token classes lie against how much the states of one class vary (our choice)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trim_lightning.trim.fingerprints import FingerprintBank, TargetTokens, unit


def within_over_between(targets: Iterable[TargetTokens], bank: FingerprintBank) -> float | None:
    """Variability within classes over the distance between them, both as 1 - cosine.

    Within: the mean distance of a target token's unit state from its class's fingerprint, over classes that occur at
    least twice. Between: the mean distance of two fingerprints. Near 0 the states of a class have collapsed to one
    point, and similarity says little more than which class a token has; near 1 classes are no clusters.

    Args:
        targets: The targets that the bank was built from.
        bank: The bank.

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
