"""What a pass keeps of responses, of models of many kinds, against the logits that the whole model gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from breaking import break_after
from transformers import PreTrainedModel

from trim_lightning.engine import scoring_pass
from trim_lightning.engine.batches import plan_shards
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.modules import ScoringPass
from trim_lightning.engine.response_learning import alignments, gradient_of, mean_states, predicted_responses
from trim_lightning.engine.shards import read_tensors
from trim_lightning.engine.token_shards import similarity_path
from trim_lightning.models.loss import HEAD_ALONE, last_hidden_states
from trim_lightning.tokens.spans import PROMPT, RESPONSE
from trim_lightning.tokens.tokenized import TokenizedRecords, TokenSequence
from trim_lightning.trim.fingerprints import TargetTokens, build_bank

Load = Callable[[str], PreTrainedModel]
LENGTHS = [12, 7, 25, 0, 3, 18, 22, 1, 14]
CPU = Resources({"accelerator": "cpu", "devices": 1}, tokens_per_batch=60)


def sequence(length: int, seed: int) -> TokenSequence:
    """Half prompt, half response; one of length 1 is a response that nothing stands before."""
    generator = np.random.default_rng(seed)
    roles = np.where(np.arange(length) < length // 2, PROMPT, RESPONSE)
    return TokenSequence(generator.integers(3, 300, length).astype(np.int32), roles.astype(np.uint8))


TARGETS = [[sequence(9, 50), sequence(15, 51)], [sequence(5, 52), sequence(1, 53)]]


def by_definition(model: PreTrainedModel, targets: list[TokenSequence], one: TokenSequence) -> np.ndarray:
    """``h^T M e`` of the response tokens of a sequence, from the model's own logits, in float64."""

    def parts(own: TokenSequence) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(own.token_ids.astype("int64"))[None]
        with torch.no_grad():
            states = last_hidden_states(model, ids)[0].double()
            logits = model(input_ids=ids).logits[0].double()
        places = [place for place in range(1, len(own.roles)) if own.roles[place] == RESPONSE]
        errors = -torch.softmax(logits[[place - 1 for place in places]], -1)
        for line, place in enumerate(places):
            errors[line, int(own.token_ids[place])] += 1
        return states[[place - 1 for place in places]], errors

    direction: Any = 0
    for target in targets:
        states, errors = parts(target)
        direction = direction + states.T @ errors / len(targets)
    states, errors = parts(one)
    return ((states @ direction) * errors).sum(1).numpy()


@pytest.mark.parametrize("architecture", ["llama", "opt", "opt_projected", "gemma3", "gemma3, capped"])
def test_it_is_what_the_whole_models_logits_say(architecture: str, tiny_model: Load, monkeypatch: Any) -> None:
    model = tiny_model(architecture.partition(",")[0])
    if architecture == "gemma3, capped":  # logits that are more than the output embedding of the last states
        model.config.final_logit_softcapping = 0.3
        monkeypatch.setattr(model, HEAD_ALONE, False, raising=False)
        monkeypatch.setattr("trim_lightning.models.loss.WHOLE", 24)
    records = [sequence(length, place) for place, length in enumerate((12, 7, 3))]
    ids = torch.zeros(3, 12, dtype=torch.int64)
    roles = torch.zeros(3, 12, dtype=torch.uint8)
    for line, record in enumerate(records):
        ids[line, : len(record.token_ids)] = torch.from_numpy(record.token_ids.astype("int64"))
        roles[line, : len(record.roles)] = torch.from_numpy(record.roles)
    with torch.no_grad():
        states, counted = last_hidden_states(model, ids), predicted_responses(roles)
        gradients = [gradient_of(model, targets) for targets in TARGETS]
        found = alignments(model, ids, states, counted, gradients)
    assert (found[:, ~counted] == 0).all()
    for line, record in enumerate(records):
        for place, targets in enumerate(TARGETS):
            expected = by_definition(model, targets, record)
            np.testing.assert_allclose(found[place, line][counted[line]], expected, rtol=2e-3, atol=1e-4)
    mean = mean_states(states, counted)
    torch.testing.assert_close(mean[:, 0].float(), states[0, 6:12].mean(0), rtol=2e-3, atol=1e-3)


@pytest.fixture
def work(tiny_model: Load, tokenized: Callable[..., TokenizedRecords], monkeypatch: Any) -> Callable[[Path], Any]:
    monkeypatch.setattr(scoring_pass, "plan_shards", functools.partial(plan_shards, shard_tokens=30))
    records = tokenized([tuple(sequence(length, place)) for place, length in enumerate(LENGTHS)])
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(0, 300, 11)
    bank = build_bank([TargetTokens(classes, torch.randn(len(classes), 32, generator=generator), classes + 1.0)])
    targets = dict(zip(("one", "two"), TARGETS, strict=True))
    request = scoring_pass.ScoringRequest({"one": bank, "two": bank}, "embedding", "all", targets=targets, states=True)

    def run(directory: Path) -> Any:
        directory.mkdir(exist_ok=True)
        return scoring_pass.run_scoring_pass(model, records, {directory: request}, resources=CPU)

    return run


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("similarity-*"))}


def test_a_killed_pass_goes_on_to_the_same_bytes(work: Callable[[Path], Any], tmp_path: Path, monkeypatch: Any) -> None:
    facts = work(tmp_path / "whole")
    assert facts["shards"] > 2
    with monkeypatch.context() as patch:
        written = break_after(2, patch)
        with pytest.raises(RuntimeError, match="killed"):
            work(tmp_path / "broken")
    names = [similarity_path(tmp_path, index).name for index in written]
    assert sorted(files_of(tmp_path / "broken")) == sorted(names)
    work(tmp_path / "broken")
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")


def test_halves_and_means_say_the_same(work: Callable[[Path], Any], tmp_path: Path, monkeypatch: Any) -> None:
    work(tmp_path / "whole")
    real = ScoringPass.on_batch

    def scarce(self: ScoringPass, batch: Any) -> Any:
        if len(batch["rows"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, batch)

    monkeypatch.setattr(ScoringPass, "on_batch", scarce)
    work(tmp_path / "halves")
    for name in files_of(tmp_path / "whole"):
        whole, halves = (read_tensors(tmp_path / part / name) for part in ("whole", "halves"))
        for tensor, values in whole.items():
            np.testing.assert_allclose(halves[tensor].astype(float), values.astype(float), rtol=1e-3, atol=1e-3)
        starts = np.cumsum([LENGTHS[row] for row in whole["rows"]])
        for place, (row, end) in enumerate(zip(whole["rows"], starts, strict=True)):
            taught = whole["alignment"][:, end - LENGTHS[row] : end].astype(np.float64)
            number = int(whole["responses"][place])
            assert number == max(0, LENGTHS[row] - max(LENGTHS[row] // 2, 1))
            mean = taught.sum(1) / number if number else np.full(2, np.nan)
            np.testing.assert_allclose(whole["mean_alignment"][:, place], mean, rtol=1e-5)
            assert number or not whole["mean_state"][place].any()
    assert read_tensors(similarity_path(tmp_path / "whole", 0))["mean_state"].dtype == np.float16
