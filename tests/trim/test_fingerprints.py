"""The fingerprint bank: unit vectors, idf, mass and count, order independence, the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from trim_lightning.stages.fingerprints import load_banks, save_banks
from trim_lightning.trim.fingerprints import TargetTokens, build_bank, inverse_document_frequency, unit

HIDDEN = 5
NAMES = ("token_ids", "vectors", "idf", "mass", "count")


@st.composite
def target_sets(draw: st.DrawFn) -> list[TargetTokens]:
    """One to four targets with zero to eight tokens of a few classes; at least one token in all."""
    classes = st.lists(st.integers(0, 6), max_size=8)
    ids = draw(st.lists(classes, min_size=1, max_size=4).filter(any))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return [
        TargetTokens(
            torch.tensor(example, dtype=torch.int64),
            torch.randn(len(example), HIDDEN, generator=generator) * 3,
            0.01 + torch.rand(len(example), generator=generator),
        )
        for example in ids
    ]


def tokens(ids: list[int], hidden: list[list[float]], saliency: list[float]) -> TargetTokens:
    return TargetTokens(torch.tensor(ids), torch.tensor(hidden).reshape(len(ids), -1), torch.tensor(saliency))


def occurrences(targets: list[TargetTokens], token_id: int) -> list[tuple[float, Tensor]]:
    """Saliency and unit state of every occurrence of a class, in float64."""
    found = []
    for example in targets:
        for place in (example.token_ids == token_id).nonzero().flatten().tolist():
            state = example.hidden[place].double()
            found.append((float(example.saliency[place]), state / state.norm()))
    return found


@given(target_sets())
def test_each_vector_is_the_normalised_weighted_sum(targets: list[TargetTokens]) -> None:
    bank = build_bank(targets)
    present = sorted({token_id for example in targets for token_id in example.token_ids.tolist()})
    assert bank.token_ids.tolist() == present
    assert len(bank) == len(present)
    assert bank.num_targets == len(targets)
    assert bank.vectors.dtype == torch.float32
    torch.testing.assert_close(bank.vectors.norm(dim=-1), torch.ones(len(bank)), rtol=0, atol=1e-6)
    for place, token_id in enumerate(present):
        found = occurrences(targets, token_id)
        total = sum(alpha * state for alpha, state in found)
        torch.testing.assert_close(bank.vectors[place].double(), total / total.norm(), rtol=0, atol=1e-5)
        assert float(bank.mass[place]) == pytest.approx(sum(alpha for alpha, _ in found), rel=1e-5)
        assert int(bank.count[place]) == len(found)
        documents = sum(token_id in example.token_ids.tolist() for example in targets)
        expected = math.log((1 + len(targets)) / (1 + documents)) + 1
        assert float(bank.idf[place]) == pytest.approx(expected, rel=1e-6)


@given(targets=target_sets(), data=st.data())
def test_order_of_targets_and_of_tokens_does_not_matter(targets: list[TargetTokens], data: st.DataObject) -> None:
    bank = build_bank(targets)
    shuffled = []
    for example in data.draw(st.permutations(targets)):
        order = torch.tensor(data.draw(st.permutations(range(len(example.token_ids)))), dtype=torch.int64)
        shuffled.append(TargetTokens(*(tensor[order] for tensor in example)))
    again = build_bank(shuffled)
    for name in NAMES:
        torch.testing.assert_close(getattr(again, name), getattr(bank, name), rtol=0, atol=2e-7)


@given(target_sets())
def test_idf_cancels_inside_a_unit_vector(targets: list[TargetTokens]) -> None:
    bank = build_bank(targets)
    idf = dict(zip(bank.token_ids.tolist(), bank.idf.tolist(), strict=True))
    weighted = [
        TargetTokens(
            example.token_ids,
            example.hidden,
            example.saliency * torch.tensor([idf[token_id] for token_id in example.token_ids.tolist()]),
        )
        for example in targets
    ]
    again = build_bank(weighted)
    torch.testing.assert_close(again.vectors, bank.vectors, rtol=0, atol=1e-6)
    torch.testing.assert_close(again.mass, bank.mass * bank.idf, rtol=1e-5, atol=0)


@given(targets=target_sets(), factor=st.floats(0.01, 100))
def test_the_length_of_hidden_states_does_not_matter(targets: list[TargetTokens], factor: float) -> None:
    scaled = [TargetTokens(example.token_ids, example.hidden * factor, example.saliency) for example in targets]
    torch.testing.assert_close(build_bank(scaled).vectors, build_bank(targets).vectors, rtol=0, atol=1e-5)


def test_a_bank_by_hand() -> None:
    first = tokens([7, 8, 7], [[2, 0], [0, 5], [0, 3]], [0.6, 1.0, 0.8])
    second = tokens([7], [[9, 0]], [0.2])
    silent = TargetTokens(torch.empty(0, dtype=torch.int64), torch.empty(0, 2), torch.empty(0))
    bank = build_bank([first, second, silent])
    assert bank.token_ids.tolist() == [7, 8]
    torch.testing.assert_close(bank.vectors, torch.tensor([[0.5**0.5, 0.5**0.5], [0, 1]]))
    assert bank.mass.tolist() == pytest.approx([1.6, 1.0])
    assert bank.count.tolist() == [3, 1]
    # a target without scoped tokens is one of the N all the same
    assert bank.idf.tolist() == pytest.approx([math.log(4 / 3) + 1, math.log(4 / 2) + 1])


@given(num_targets=st.integers(1, 10_000), data=st.data())
def test_idf_formula(num_targets: int, data: st.DataObject) -> None:
    frequencies = data.draw(st.lists(st.integers(1, num_targets), min_size=1, max_size=5))
    idf = inverse_document_frequency(torch.tensor(frequencies, dtype=torch.float64), num_targets)
    expected = [math.log((1 + num_targets) / (1 + frequency)) + 1 for frequency in frequencies]
    assert idf.tolist() == pytest.approx(expected, rel=1e-12)
    assert (idf >= 1 - 1e-12).all()


def test_bfloat16_states_are_normalised_in_float32() -> None:
    hidden = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    lengths = unit(hidden).norm(dim=-1)
    assert lengths.dtype == torch.float32
    torch.testing.assert_close(lengths, torch.ones(50), rtol=0, atol=1e-6)


def test_zero_states_and_states_that_cancel_give_no_nan() -> None:
    assert unit(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    bank = build_bank([tokens([1, 2, 2], [[0, 0], [1, 0], [-1, 0]], [1, 1, 1])])
    assert torch.isfinite(bank.vectors).all()


def test_no_targets_is_an_error_and_no_tokens_an_empty_bank() -> None:
    with pytest.raises(ValueError, match="no targets"):
        build_bank([])
    empty = TargetTokens(torch.empty(0, dtype=torch.int64), torch.empty(0, HIDDEN), torch.empty(0))
    bank = build_bank([empty, empty])
    assert (len(bank), bank.num_targets, bank.vectors.shape) == (0, 2, (0, HIDDEN))


@pytest.mark.parametrize("groups", [("",), ("algebra", "naïve/漢字"), ("a", "a/b")])
def test_banks_survive_the_file(groups: tuple[str, ...], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    banks = {
        group: build_bank(
            [
                TargetTokens(
                    torch.randint(9, (4,), generator=generator),
                    torch.randn(4, HIDDEN, generator=generator),
                    torch.rand(4, generator=generator),
                )
                for _ in range(place + 1)
            ]
        )
        for place, group in enumerate(groups)
    }
    path = tmp_path / "fingerprints.safetensors"
    save_banks(banks, path, {"scope": "all", "groups": {group: [0] for group in groups}})
    loaded = load_banks(path)
    assert list(loaded) == list(groups)
    for group, bank in banks.items():
        again = loaded[group]
        assert again.num_targets == bank.num_targets
        assert again.settings == {"scope": "all", "groups": {name: [0] for name in groups}}
        for name in NAMES:
            assert torch.equal(getattr(again, name), getattr(bank, name))
            assert getattr(again, name).dtype == getattr(bank, name).dtype


def test_the_file_of_one_bank_has_the_names_and_types_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "fingerprints.safetensors"
    save_banks({"": build_bank([tokens([3, 1], [[1, 0], [0, 1]], [1, 1])])}, path, {"scope": "prompt"})
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(NAMES)
        shapes = {name: tuple(file.get_tensor(name).shape) for name in NAMES}
        assert shapes == {"token_ids": (2,), "vectors": (2, 2), "idf": (2,), "mass": (2,), "count": (2,)}
        assert file.get_tensor("vectors").dtype == torch.float32
        assert json.loads(file.metadata()["settings"]) == {"scope": "prompt", "num_targets": {"": 1}}
