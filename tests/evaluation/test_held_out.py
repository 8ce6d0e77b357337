"""The held-out loss against plain transformers in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedModel

from evaluation.conftest import Opened, Plain, response_losses, varied_pairs
from trim_lightning.engine.labels import labels_of
from trim_lightning.engine.response_loss import mean_response_loss, response_counts

Load = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "opt", "opt_projected", "gemma3"])
def test_losses_are_those_of_plain_transformers(
    architecture: str, tiny_model: Load, plain: Callable[[str], Plain], opened: Callable[..., Opened]
) -> None:
    pairs = [*varied_pairs(9), {"prompt": "no answer", "response": ""}, {"prompt": "", "response": "no question"}]
    _, tokens, _ = opened(pairs, architecture=architecture)
    reference = plain(architecture)
    found = response_losses(tiny_model(architecture), tokens, 200)
    counts = response_counts(tokens)
    for row, pair in enumerate(pairs):
        ids, counted = reference.encode([("user", pair["prompt"]), ("assistant", pair["response"])])
        assert tokens[row].token_ids.tolist() == ids
        assert counts[row] == sum(counted)
        assert found[row] == pytest.approx(reference.loss(ids, counted), rel=2e-5)
    assert counts[9] == found[9] == 0


def test_the_token_that_ends_a_turn_is_learnt_but_not_measured(
    plain: Callable[[str], Plain], opened: Callable[..., Opened]
) -> None:
    _, tokens, _ = opened([{"prompt": "how many", "response": "twelve eggs"}])
    reference = plain("llama")
    ids, counted = reference.encode([("user", "how many"), ("assistant", "twelve eggs")])
    end = max(place for place, holds in enumerate(counted) if holds) + 1
    assert ids[end] == reference.tokenizer.eos_token_id
    measured = np.flatnonzero(labels_of(tokens[0], with_end=False) >= 0)
    learnt = np.flatnonzero(labels_of(tokens[0]) >= 0)
    assert measured.tolist() == [place for place, holds in enumerate(counted) if holds]
    assert learnt.tolist() == [*measured.tolist(), end]


def test_every_assistant_turn_is_measured(
    tiny_model: Load, plain: Callable[[str], Plain], opened: Callable[..., Opened]
) -> None:
    turns = [("system", "be brief"), ("user", "add 3 and 4"), ("assistant", "7"), ("user", "and 5"),
             ("assistant", "twelve in total")]  # fmt: skip
    _, tokens, _ = opened([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    ids, counted = plain("llama").encode(turns)
    (found,) = response_losses(tiny_model("llama"), tokens, 99)
    assert response_counts(tokens).tolist() == [sum(counted)]
    assert found == pytest.approx(plain("llama").loss(ids, counted), rel=2e-5)


def test_a_cut_record_is_measured_on_what_is_left(
    tiny_model: Load, plain: Callable[[str], Plain], opened: Callable[..., Opened]
) -> None:
    pair = varied_pairs(8)[7]
    ids, counted = plain("llama").encode([("user", pair["prompt"]), ("assistant", pair["response"])])
    length = counted.index(True) + 3
    _, tokens, _ = opened([pair, {"prompt": "word " * 400, "response": "never reached"}], max_length=length)
    found = response_losses(tiny_model("llama"), tokens, 99)
    assert response_counts(tokens).tolist() == [3, 0]
    assert found[0] == pytest.approx(plain("llama").loss(ids[:length], counted[:length]), rel=2e-5)
    assert found[1] == 0


def test_batches_do_not_change_a_loss(tiny_model: Load, opened: Callable[..., Opened]) -> None:
    _, tokens, _ = opened(varied_pairs(20))
    model = tiny_model("mistral")  # with a window of 12 tokens
    small, large = (response_losses(model, tokens, size) for size in (1, 5000))
    np.testing.assert_allclose(small, large, rtol=1e-5)


def test_the_loss_that_stops_a_training_is_the_one_that_is_reported(
    tiny_model: Load, opened: Callable[..., Opened]
) -> None:
    _, tokens, _ = opened(varied_pairs(12))
    model = tiny_model("llama")
    losses = response_losses(model, tokens, 300)
    expected = losses.sum() / response_counts(tokens).sum()
    assert mean_response_loss(model, tokens, 300) == pytest.approx(expected, rel=1e-12)


def test_the_loss_of_a_diverged_model_is_not_finite(tiny_model: Load, opened: Callable[..., Opened]) -> None:
    _, tokens, _ = opened(varied_pairs(4))
    model = copy.deepcopy(tiny_model("llama"))
    for weight in model.parameters():
        weight.data.fill_(float("nan"))
    assert np.isnan(response_losses(model, tokens, 300)).all()
