"""Matching: the own class first, else the nearest by embedding or by hidden state; ties and chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trim_lightning.trim.matching as matching
from trim_lightning.trim.fingerprints import FingerprintBank, TargetTokens, build_bank, unit
from trim_lightning.trim.matching import Matcher, nearest_classes


def random_bank(class_ids: Tensor, hidden: int, generator: torch.Generator) -> FingerprintBank:
    states = torch.randn(len(class_ids), hidden, generator=generator)
    return build_bank([TargetTokens(class_ids, states, torch.ones(len(class_ids)))])


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Embeddings ``[vocabulary, width]`` with repeated and all-zero rows, and ascending class ids."""
    size, width = draw(st.integers(1, 60)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kinds = torch.randn(draw(st.integers(1, size)), width, generator=generator)
    embeddings = kinds[torch.randint(len(kinds), (size,), generator=generator)]
    if draw(st.booleans()):
        embeddings[torch.rand(size, generator=generator) < 0.2] = 0
    classes = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return embeddings, torch.tensor(sorted(classes))


@given(vocabularies())
def test_nearest_is_the_highest_cosine_and_ties_go_to_the_lowest_id(case: tuple[Tensor, Tensor]) -> None:
    embeddings, class_ids = case
    table = nearest_classes(embeddings, class_ids)
    exact = torch.nn.functional.normalize(embeddings.double(), dim=-1, eps=1e-12)
    for token_id in range(len(embeddings)):
        if token_id in class_ids.tolist():
            assert class_ids[table[token_id]] == token_id
            continue
        cosines = exact[class_ids] @ exact[token_id]
        chosen = int(table[token_id])
        assert cosines[chosen] >= cosines.max() - 1e-5
        same = (embeddings[class_ids] == embeddings[class_ids[chosen]]).all(-1)
        assert chosen == int(same.nonzero()[0]), "of equal embeddings the lowest id must win"


@given(case=vocabularies(), chunk=st.integers(1, 70))
def test_chunks_of_the_vocabulary_change_nothing(case: tuple[Tensor, Tensor], chunk: int) -> None:
    embeddings, class_ids = case
    assert torch.equal(nearest_classes(embeddings, class_ids, chunk), nearest_classes(embeddings, class_ids))


@pytest.mark.parametrize("classes", [7, 10, 83])
def test_many_equal_embeddings_tie_to_the_lowest_id(classes: int) -> None:
    """Sizes at which a matrix product rounds equal columns differently."""
    generator = torch.Generator().manual_seed(classes)
    embeddings = torch.randn(2900, 450, generator=generator)
    class_ids = torch.randperm(2900, generator=generator)[:classes].sort().values
    embeddings[class_ids] = embeddings[class_ids[:1]]
    table = nearest_classes(embeddings, class_ids)
    unknown = ~torch.isin(torch.arange(2900), class_ids)
    assert (table[unknown] == 0).all()


def test_a_tie_between_directions_goes_to_the_lowest_id() -> None:
    embeddings = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    assert nearest_classes(embeddings, torch.tensor([2, 3])).tolist() == [1, 0, 0, 1, 0, 1]
    assert nearest_classes(embeddings, torch.tensor([0, 2]))[4] == 0


def test_zero_embeddings_give_numbers() -> None:
    embeddings = torch.zeros(4, 3)
    embeddings[1] = torch.tensor([1.0, 0, 0])
    for class_ids in ([0, 1], [0, 2]):
        assert nearest_classes(embeddings, torch.tensor(class_ids))[3] == 0
    bank = random_bank(torch.tensor([0, 2]), 4, torch.Generator().manual_seed(0))
    similarity, classes = Matcher.prepare(bank, embeddings).match(torch.tensor([0, 1, 3]), torch.zeros(3, 4))
    assert similarity.tolist() == [0.0, 0.0, 0.0]
    assert classes[0] == 0


@settings(max_examples=60)
@given(case=vocabularies(), nearest=st.sampled_from(["embedding", "hidden"]), seed=st.integers(0, 999))
def test_similarity_is_the_cosine_with_the_matched_class(case: tuple[Tensor, Tensor], nearest: str, seed: int) -> None:
    embeddings, class_ids = case
    generator = torch.Generator().manual_seed(seed)
    bank = random_bank(class_ids, 6, generator)
    matcher = Matcher.prepare(bank, embeddings, nearest)
    token_ids = torch.randint(len(embeddings), (25,), generator=generator)
    hidden = torch.randn(25, 6, generator=generator) * 4
    similarity, matched = matcher.match(token_ids, unit(hidden))
    assert similarity.dtype == torch.float32
    known = class_ids.tolist()
    table = nearest_classes(embeddings, class_ids)
    for place, token_id in enumerate(token_ids.tolist()):
        cosines = torch.nn.functional.cosine_similarity(bank.vectors.double(), hidden[place].double()[None])
        chosen = known.index(int(matched[place]))
        assert float(similarity[place]) == pytest.approx(float(cosines[chosen]), abs=1e-5)
        if token_id in known:
            assert int(matched[place]) == token_id, "a class with a fingerprint is matched directly"
        elif nearest == "embedding":
            assert chosen == table[token_id]
        else:
            assert float(cosines[chosen]) >= float(cosines.max()) - 1e-5


def test_chunks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(40, 8, generator=generator)
    bank = random_bank(torch.arange(0, 40, 5), 6, generator)
    matcher = Matcher.prepare(bank, embeddings, "hidden")
    token_ids, hidden = torch.randint(40, (100,), generator=generator), torch.randn(100, 6, generator=generator)
    whole = matcher.match(token_ids, unit(hidden))
    monkeypatch.setattr(matching, "CHUNK", 3)
    for one, many in zip(whole, matcher.match(token_ids, unit(hidden)), strict=True):
        torch.testing.assert_close(many, one, rtol=0, atol=1e-6)


def test_matching_leaves_the_fallback_table_as_it_is() -> None:
    generator = torch.Generator().manual_seed(2)
    matcher = Matcher.prepare(
        random_bank(torch.tensor([1, 3]), 6, generator), torch.randn(9, 5, generator=generator), "hidden"
    )
    before = matcher.table.clone()
    matcher.match(torch.arange(9), unit(torch.randn(9, 6, generator=generator)))
    assert torch.equal(matcher.table, before)


def test_the_two_fallbacks_differ_where_they_should() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
    bank = build_bank([TargetTokens(torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2))])
    state, token = torch.tensor([[0.6, 0.8]]), torch.tensor([2])
    similarity, matched = Matcher.prepare(bank, embeddings, "embedding").match(token, state)
    assert (matched.item(), similarity.item()) == (0, pytest.approx(0.6))
    similarity, matched = Matcher.prepare(bank, embeddings, "hidden").match(token, state)
    assert (matched.item(), similarity.item()) == (1, pytest.approx(0.8))
