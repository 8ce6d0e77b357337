"""Full fine-tuning, and the switches that must not change what is learnt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.conftest import TrainingFiles
from trim_lightning.pipeline.train import Training
from trim_lightning.tokens.tokenized import TokenSequence
from trim_lightning.tuning.micro_batches import plan_micro_batches

WEIGHTS = "model/model.safetensors"
FULL = ("train.mode=full", "train.learning_rate=0.001")


def test_the_model_loads_with_transformers_alone(
    trained: Callable[..., Training], training_files: TrainingFiles
) -> None:
    run = trained(*FULL, training_files.held_out("plain"))
    assert not (run.directory / "adapter").exists()
    model = AutoModelForCausalLM.from_pretrained(run.directory / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run.directory / "model")
    base = load_file(training_files.root / WEIGHTS)
    changed = [name for name, tensor in load_file(run.directory / WEIGHTS).items() if not tensor.equal(base[name])]
    assert len(changed) == len(base)  # the embeddings among them
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a train"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.config._attn_implementation == "sdpa"
    assert torch.isfinite(model(**ids).logits).all()
    for file in (run.directory / "model").iterdir():
        assert str(training_files.root).encode() not in file.read_bytes(), file.name


def test_the_saved_model_is_the_one_that_was_measured(
    trained: Callable[..., Training], training_files: TrainingFiles, tmp_path: Path
) -> None:
    run = trained(*FULL, training_files.held_out("plain"))
    saved = f"train.model={run.directory / 'model'}"
    again = trained(training_files.held_out("plain"), saved, "train.lora_rank=2", name="again")
    assert again.metrics["eval/nll_before"] == run.metrics["eval/nll"]
    assert run.metrics["eval/nll"] < run.metrics["eval/nll_before"]


def test_bfloat16_models_are_trained_in_float32(
    trained: Callable[..., Training], training_files: TrainingFiles, tmp_path: Path
) -> None:
    """Steps of 1e-5 vanish in bfloat16 weights of size 0.2, whose spacing is about 1e-3."""
    tiny = ("train.mode=full", "train.learning_rate=0.00001", "model.dtype=bfloat16")
    run = trained(*tiny, training_files.held_out("plain"), store=tmp_path / "store")
    base, tuned = load_file(training_files.root / WEIGHTS), load_file(run.directory / WEIGHTS)
    assert {tensor.dtype for tensor in tuned.values()} == {torch.float32}
    matrices = [name for name in tuned if tuned[name].dim() > 1]
    steps = torch.cat([(tuned[name] - base[name]).abs().flatten() for name in matrices])
    assert 0 < steps.mean() < 1e-4
    assert run.metrics["eval/nll"] != run.metrics["eval/nll_before"]
    # measured in bfloat16 all the same, and alike whether the model was just trained or comes from the store
    for entry in (tmp_path / "store" / "evaluate").iterdir():
        shutil.rmtree(entry)
    again = trained(*tiny, training_files.held_out("plain"), store=tmp_path / "store", name="again")
    assert again.manifest["stages"]["finetune"]["cached"]
    assert not again.manifest["stages"]["evaluate_after"]["cached"]
    assert again.metrics == run.metrics


@pytest.mark.parametrize("mode", [("train.mode=lora",), FULL], ids=["lora", "full"])
def test_gradient_checkpointing_changes_memory_alone(mode: tuple[str, ...], trained: Callable[..., Training]) -> None:
    options = (*mode, "train.lora_dropout=0.2", "train.epochs=1")
    plain = trained(*options, name="plain").directory
    thrifty = trained(*options, "train.gradient_checkpointing=true", name="thrifty").directory
    (name,) = (str(file.relative_to(plain)) for file in plain.glob("*/*.safetensors"))
    expected, found = load_file(plain / name), load_file(thrifty / name)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_recomputes(
    trained: Callable[..., Training], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[bool] = []
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, states: torch.Tensor) -> torch.Tensor:
        calls.append(True)
        return forward(self, states)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    counts = []
    for value in ("false", "true"):
        calls.clear()
        trained(f"train.gradient_checkpointing={value}", store=tmp_path / value)
        counts.append(len(calls))
    assert counts[1] == counts[0] + 4 * 3  # layers, micro-batches; the check of the adapter takes no gradient


# records of similar length in one step


class Lengths(list[TokenSequence]):
    """Records of given lengths whose second half is the response."""

    def __init__(self, lengths: list[int]) -> None:
        roles = [np.array([1] * (size // 2) + [2] * (size - size // 2), np.uint8) for size in lengths]
        super().__init__(TokenSequence(np.arange(len(part), dtype=np.int32), part) for part in roles)
        self.lengths = np.array(lengths, dtype=np.int64)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=70),
    batch_size=st.integers(1, 9),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
    grouped=st.booleans(),
)
def test_every_epoch_has_every_record_once(
    lengths: list[int], batch_size: int, epochs: int, seed: int, grouped: bool
) -> None:
    plan = plan_micro_batches(
        Lengths(lengths),  # type: ignore[arg-type]
        range(len(lengths)),
        batch_size=batch_size,
        epochs=epochs,
        tokens_per_micro_batch=100,
        seed=seed,
        length_grouped=grouped,
    )
    seen: list[int] = []
    steps: list[list[int]] = [[]]
    for micro in plan:
        steps[-1] += micro.rows
        seen += micro.rows
        if micro.closes_step:
            steps.append([])
        if micro.closes_epoch:
            assert sorted(seen) == list(range(len(lengths)))
            epochs -= 1
            seen = []
    assert epochs == 0
    assert seen == steps.pop() == []
    assert max(map(len, steps)) <= batch_size


def test_grouped_steps_hold_records_of_similar_length() -> None:
    lengths = [2 + 97 * row % 83 for row in range(200)]

    def spread(grouped: bool) -> float:
        plan = plan_micro_batches(
            Lengths(lengths),  # type: ignore[arg-type]
            range(200),
            batch_size=8,
            epochs=1,
            tokens_per_micro_batch=10_000,
            seed=0,
            length_grouped=grouped,
        )
        return float(np.mean([np.ptp([lengths[row] for row in micro.rows]) for micro in plan]))

    assert spread(grouped=True) < 5 < 40 < spread(grouped=False)


def test_grouping_costs_the_same_tokens(trained: Callable[..., Training]) -> None:
    mixed, grouped = (
        trained(f"train.length_grouped={value}", "train.batch_size=4", "train.epochs=2", name=value)
        for value in ("false", "true")
    )
    for name in ("train/records", "train/tokens", "train/trained_tokens", "train/steps"):
        assert grouped.metrics[name] == mixed.metrics[name]
    weights = "adapter/adapter_model.safetensors"
    assert (grouped.directory / weights).read_bytes() != (mixed.directory / weights).read_bytes()
