"""Variability within classes against distance between them, against a slow reading of the definition."""

from __future__ import annotations

import pytest
import torch

from trim_lightning.trim.fingerprints import TargetTokens, build_bank, within_over_between


def targets(noise: float, classes: int = 5, seed: int = 0) -> list[TargetTokens]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 16, generator=generator)
    found = []
    for _ in range(4):
        ids = torch.randint(classes, (12,), generator=generator) * 3
        hidden = centres[ids // 3] + noise * torch.randn(12, 16, generator=generator)
        found.append(TargetTokens(ids, hidden, torch.rand(12, generator=generator) + 0.1))
    return found


def slowly(examples: list[TargetTokens]) -> float:
    bank = build_bank(examples)
    place = {int(token): number for number, token in enumerate(bank.token_ids)}
    within = []
    for example in examples:
        for token, state in zip(example.token_ids.tolist(), example.hidden, strict=True):
            if bank.count[place[token]] > 1:
                within.append(1 - torch.cosine_similarity(state, bank.vectors[place[token]], dim=0).item())
    between = [
        1 - torch.dot(bank.vectors[one], bank.vectors[two]).item()
        for one in range(len(bank))
        for two in range(len(bank))
        if one != two
    ]
    return (sum(within) / len(within)) / (sum(between) / len(between))


@pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
def test_it_is_what_the_definition_says(noise: float) -> None:
    examples = targets(noise)
    assert within_over_between(examples, build_bank(examples)) == pytest.approx(slowly(examples), rel=1e-5)


def test_equal_states_have_collapsed_and_noise_has_not() -> None:
    ratios = [within_over_between(found, build_bank(found)) for found in map(targets, (0.0, 0.3, 3.0))]
    assert ratios[0] == pytest.approx(0, abs=1e-6)
    assert ratios == sorted(ratios)


def test_there_is_no_ratio_of_one_class_or_of_single_tokens() -> None:
    single = [TargetTokens(torch.tensor([1, 2]), torch.randn(2, 8), torch.ones(2))]
    assert within_over_between(single, build_bank(single)) is None
    same = [TargetTokens(torch.tensor([1, 1]), torch.randn(2, 8), torch.ones(2))]
    assert within_over_between(same, build_bank(same)) is None
