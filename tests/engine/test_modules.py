"""The two forward passes on real tiny models: what they return, and that padding and company change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tiny_models import ARCHITECTURES
from trim_lightning.engine.batches import Shard, ShardBatches
from trim_lightning.engine.modules import ScoringPass, TargetPass
from trim_lightning.engine.trainer import REPLACED, make_trainer
from trim_lightning.errors import UserError
from trim_lightning.models.load import load_model
from trim_lightning.models.loss import HEAD_ALONE, last_hidden_states, token_probabilities
from trim_lightning.tokens.tokenized import TokenSequence, scope_mask
from trim_lightning.trim.fingerprints import FingerprintBank, TargetTokens, build_bank, unit
from trim_lightning.trim.matching import nearest_classes

Load = Callable[[str], PreTrainedModel]
LENGTHS = (31, 18, 7, 2, 1)


def sequences(seed: int = 0) -> list[TokenSequence]:
    generator = np.random.default_rng(seed)
    return [
        TokenSequence(
            generator.integers(3, 300, length).astype(np.int32), generator.integers(0, 3, length).astype(np.uint8)
        )
        for length in LENGTHS
    ]


def batch_of(records: Sequence[TokenSequence], rows: Sequence[int], pad_token_id: int = 0) -> dict[str, Any]:
    shard = Shard(0, (tuple(rows),), sum(len(records[row].token_ids) for row in rows))
    return ShardBatches(records, [shard], "all", pad_token_id)[0]


def run(module: Any, batch: dict[str, Any]) -> Any:
    with torch.inference_mode():
        return module.predict_step(batch, 0)


def random_bank(seed: int, classes: Sequence[int]) -> FingerprintBank:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(classes), 32, generator=generator)
    return build_bank([TargetTokens(torch.tensor(classes), states, torch.ones(len(classes)))])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_are_those_that_the_head_reads(architecture: str, tiny_model: Load) -> None:
    model = tiny_model(architecture)
    input_ids = torch.from_numpy(sequences()[0].token_ids.astype(np.int64))[None]
    with torch.inference_mode():
        states = last_hidden_states(model, input_ids)
        logits = model(input_ids=input_ids).logits
        torch.testing.assert_close(model.get_output_embeddings()(states), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "gemma3"])
def test_target_pass_does_not_depend_on_padding_or_company(architecture: str, tiny_model: Load) -> None:
    model, records = tiny_model(architecture), sequences()
    layers = model.config.num_hidden_layers
    module = TargetPass(model)
    together = run(module, batch_of(records, range(len(records)), pad_token_id=11))
    assert [result["row"] for result in together] == list(range(len(records)))
    for row, result in enumerate(together):
        length = LENGTHS[row]
        assert result["token_ids"].tolist() == records[row].token_ids.tolist()
        assert result["roles"].tolist() == records[row].roles.tolist()
        assert result["row_signal"].shape == result["column_signal"].shape == (layers, length)
        assert result["hidden"].shape == (length, 32)
        (alone,) = run(module, batch_of(records, [row]))
        for name in ("row_signal", "column_signal", "probability", "hidden"):
            assert alone[name].dtype == torch.float32
            torch.testing.assert_close(
                result[name], alone[name], rtol=0, atol=2e-5, equal_nan=True, msg=f"{name} of row {row}"
            )


@pytest.mark.parametrize("shortcut", [True, False])
def test_probabilities_are_those_of_the_models_own_logits(
    shortcut: bool, tiny_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model, HEAD_ALONE, shortcut, raising=False)
    monkeypatch.setattr("trim_lightning.models.loss.CHUNK", 5)
    ids = batch_of(sequences(), range(len(LENGTHS)))["input_ids"]
    with torch.no_grad():
        logits, states = model(input_ids=ids).logits, last_hidden_states(model, ids)
    expected = logits[:, :-1].softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    monkeypatch.setattr("trim_lightning.models.loss.WHOLE", 2 * ids.shape[1])
    for together in (True, False):
        found = token_probabilities(model, ids, states, together)
        assert found[:, 0].isnan().all()
        torch.testing.assert_close(found[:, 1:], expected, rtol=1e-4, atol=1e-6)
        wanted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
        some = token_probabilities(model, ids, states, together, wanted)
        assert (some[:, 1:].isnan() == ~wanted[:, 1:]).all()
        torch.testing.assert_close(some[:, 1:][wanted[:, 1:]], expected[wanted[:, 1:]], rtol=1e-4, atol=1e-6)
        assert token_probabilities(model, ids, states, together, torch.zeros_like(wanted)).isnan().all()


@pytest.mark.parametrize("nearest", ["embedding", "hidden"])
def test_scoring_pass_gives_the_cosine_of_every_token_in_every_bank(nearest: str, tiny_model: Load) -> None:
    model, records = tiny_model("llama"), sequences()
    banks = {"a": random_bank(1, range(0, 300, 7)), "b": random_bank(2, [5, 6])}
    module = ScoringPass(model, [(bank, nearest) for bank in banks.values()])
    module.on_predict_start()
    rows = [3, 0, 4]
    result = run(module, batch_of(records, rows, pad_token_id=2))
    assert result["rows"].tolist() == rows
    assert result["lengths"].tolist() == [LENGTHS[row] for row in rows]
    ids = np.concatenate([records[row].token_ids for row in rows])
    assert result["token_ids"].tolist() == ids.tolist()
    assert result["roles"].tolist() == [role for row in rows for role in records[row].roles]
    inputs = [torch.from_numpy(records[row].token_ids.astype(np.int64))[None] for row in rows]
    with torch.inference_mode():
        states = torch.cat([last_hidden_states(model, input_ids)[0] for input_ids in inputs])
    embeddings = model.get_input_embeddings().weight
    for place, bank in enumerate(banks.values()):
        cosines = unit(states) @ bank.vectors.T
        table = nearest_classes(embeddings, bank.token_ids)
        for token, token_id in enumerate(ids.tolist()):
            chosen = bank.token_ids.tolist().index(int(module.match_of(result, place)[token]))
            assert float(result["similarity"][place, token]) == pytest.approx(float(cosines[token, chosen]), abs=1e-5)
            if token_id in bank.token_ids.tolist() or nearest == "embedding":
                assert chosen == table[token_id]
            else:
                assert float(cosines[token, chosen]) >= float(cosines[token].max()) - 1e-5


def test_a_bank_of_next_token_classes_is_met_by_the_states_before(tiny_model: Load) -> None:
    model, records = tiny_model("llama"), sequences()
    own = random_bank(1, range(0, 300, 7))
    module = ScoringPass(model, [(own, "embedding"), (replace(own, token_class="next"), "embedding")])
    module.on_predict_start()
    rows = [3, 0, 4]
    result = run(module, batch_of(records, rows, pad_token_id=2))
    assert (module.match_of(result, 0) == module.match_of(result, 1)).all()
    place = 0
    for row in rows:
        ids = torch.from_numpy(records[row].token_ids.astype(np.int64))
        with torch.inference_mode():
            states = unit(last_hidden_states(model, ids[None])[0])
        for token in range(len(ids)):
            chosen = own.token_ids.tolist().index(int(module.match_of(result, 0)[place]))
            before = states[max(0, token - 1)]  # nothing predicts the first token, which keeps its own state
            assert float(result["similarity"][0, place]) == pytest.approx(
                float(states[token] @ own.vectors[chosen]), abs=1e-5
            )
            assert float(result["similarity"][1, place]) == pytest.approx(float(before @ own.vectors[chosen]), abs=1e-5)
            place += 1


def test_errors_are_of_the_scopes_that_want_them(tiny_model: Load) -> None:
    model, records = tiny_model("llama"), sequences()
    with torch.no_grad():  # so that chances differ
        model.get_output_embeddings().weight.mul_(6)
    rows, bank = [3, 0, 4], random_bank(1, [9])
    for row in rows:  # and so that some tokens are what the model expects
        ids = torch.from_numpy(records[row].token_ids.astype(np.int64))[None]
        for token in range(2, ids.shape[1], 3):
            with torch.no_grad():
                ids[0, token] = model(input_ids=ids[:, :token]).logits[0, -1].argmax()
        records[row] = TokenSequence(ids[0].numpy().astype(np.int32), records[row].roles)
    scopes = ["response", "all"]
    module = ScoringPass(model, [(bank, "embedding")], error_scopes=scopes)
    module.on_predict_start()
    result = run(module, batch_of(records, rows, pad_token_id=2))
    for scope in scopes:
        expected = []
        for row in rows:
            ids = torch.from_numpy(records[row].token_ids.astype(np.int64))[None]
            with torch.no_grad():
                chances = model(input_ids=ids).logits[0].softmax(-1)
            wanted = scope_mask(records[row].roles, scope)
            expected += [
                1 - float(chances[token - 1, ids[0, token]]) if wanted[token] and token else 0.0
                for token in range(ids.shape[1])
            ]
        found = result[f"error/{scope}"]
        assert found.dtype == torch.float16
        assert found.float().numpy() == pytest.approx(np.array(expected), abs=1e-3)
        assert np.std([value for value in expected if value]) > 0.05
    assert not any(
        "error" in name for name in run(started(ScoringPass(model, [(bank, "embedding")])), batch_of(records, rows))
    )


def started(module: ScoringPass) -> ScoringPass:
    module.on_predict_start()
    return module


def test_a_bank_of_one_class_matches_every_token_with_it(tiny_model: Load) -> None:
    module = ScoringPass(tiny_model("llama"), [(random_bank(1, [9]), "embedding")])
    module.on_predict_start()
    result = run(module, batch_of(sequences(), [0, 1]))
    assert set(module.match_of(result, 0).tolist()) == {9}
    assert result["similarity"].abs().max() <= 1 + 1e-6


# ------------------------------------------------------------------------------------------- the trainer


@pytest.mark.parametrize("name", REPLACED)
def test_arguments_that_would_change_results_unseen_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"trainer\.{name}: cannot be set here; use \w+") as caught:
        make_trainer({"accelerator": "cpu", name: 1}, [])
    assert "\n" not in str(caught.value)


def test_a_mistyped_argument_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"trainer\.acelerator: .*did you mean trainer\.accelerator\?"):
        make_trainer({"acelerator": "cpu"}, [])


def test_an_absent_device_is_refused_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError) as caught:
        make_trainer({"accelerator": "gpu", "devices": 1}, [])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("trainer")


def test_a_model_that_accelerate_has_spread_is_not_moved(tiny_source: Any) -> None:
    model = load_model(replace(tiny_source("llama"), device_map="auto"), torch.float32)
    model.hf_device_map = {"": "cpu"}  # accelerate leaves it out where there is one device
    module = ScoringPass(model, [(random_bank(1, [9]), "embedding")])
    assert not list(module.parameters()), "Lightning would move what is registered"
    module.on_predict_start()
    assert run(module, batch_of(sequences(), [0]))["similarity"].shape == (1, LENGTHS[0])
