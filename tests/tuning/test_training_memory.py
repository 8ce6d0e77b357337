"""A training fits into the device's memory: measured before it begins, cut smaller where that was not enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel

from trim_lightning.errors import UserError
from trim_lightning.models.lora import add_lora
from trim_lightning.models.loss import IGNORED, summed_loss
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning import memory, run
from trim_lightning.tuning.lora_module import TuningModule
from trim_lightning.tuning.memory import (
    FEWEST_TOKENS,
    MicroBatches,
    TrainingMemory,
    room_for_training,
    weight_bytes,
)
from trim_lightning.tuning.run import (
    ADAPTER,
    CHECKPOINT,
    MICRO_BATCHES,
    TrainingSite,
    choose_micro_batches,
    train_model,
)

Load = Callable[[str], PreTrainedModel]
TOO_MUCH = 1 << 60  # bytes
FAST = TuningSettings(epochs=2, batch_size=6, lora_rank=4, lora_dropout=0.0, learning_rate=1e-2)
LENGTHS = (40, 30, 30, 20, 20, 20, 10, 10, 10, 10)


@pytest.fixture
def records(tokenized: Callable[..., TokenizedRecords]) -> TokenizedRecords:
    """Ten records whose second half is the response."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    return tokenized([(part, [1] * (len(part) // 2) + [2] * (len(part) // 2)) for part in ids])


@pytest.fixture
def train(tiny_model: Load, records: TokenizedRecords, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Trains a fresh tiny model; gives the facts and the directory."""

    def start(name: str, settings: TuningSettings = FAST) -> tuple[dict[str, Any], Path]:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        around = TrainingSite(directory, {"accelerator": "cpu", "devices": 1}, "training")
        _, facts = train_model(tiny_model("llama"), records, range(10), settings, around, seed=0)
        return facts, directory

    return start


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / ADAPTER / "adapter_model.safetensors")


def narrow(monkeypatch: pytest.MonkeyPatch, records: int, *, unless_recomputing: bool = False) -> list[int]:
    """Let memory hold training passes of so many records; the list gets the sizes that did not fit."""
    refused: list[int] = []
    forward = LlamaModel.forward

    def guarded(self: Any, *arguments: Any, **keywords: Any) -> Any:
        result = forward(self, *arguments, **keywords)
        size, length = (keywords["input_ids"] if "input_ids" in keywords else arguments[0]).shape
        fits = unless_recomputing and self.is_gradient_checkpointing
        if self.training and size > records and length != 64 and not fits:  # 64: what is measured before
            refused.append(size)
            torch.empty(TOO_MUCH, dtype=torch.uint8)  # the allocator's own error
        return result

    monkeypatch.setattr(LlamaModel, "forward", guarded)
    return refused


# ------------------------------------------------------------------------------------ when memory runs out


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_training_goes_on_in_smaller_parts_and_learns_the_same(
    clip: float, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(FAST, gradient_clip=clip, tokens_per_micro_batch=240)
    whole, expected = train("whole", settings)
    refused = narrow(monkeypatch, 1)
    parts, found = train("parts", settings)
    assert sorted(set(refused)) == [2, 3, 6]  # once each: what did not fit is not tried again
    assert len(refused) == 3
    assert "micro-batches are cut into 8 parts" in caplog.text
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert {name: parts[name] for name in ("steps", "tokens", "trained_tokens")} == {
        name: whole[name] for name in ("steps", "tokens", "trained_tokens")
    }
    for name, tensor in adapter(expected).items():
        torch.testing.assert_close(adapter(found)[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_single_record_is_trained_on_with_recomputed_activations(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = train("whole")
    narrow(monkeypatch, 0, unless_recomputing=True)
    parts, _ = train("parts")
    assert "activations are recomputed from here on" in caplog.text
    assert (whole["gradient_checkpointing"], parts["gradient_checkpointing"]) == (False, True)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_single_record_that_does_not_fit_is_one_clear_line(
    checkpointing: bool | None, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch, 0)
    with pytest.raises(UserError, match=r"does not suffice to train on a single record of [34]0 tokens") as caught:
        train("out", replace(FAST, gradient_checkpointing=checkpointing))
    assert "\n" not in str(caught.value)


def test_dropout_is_repeated_with_the_step(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out once, in the second micro-batch of a step whose parts are single records anyway."""
    settings = replace(FAST, lora_dropout=0.5, tokens_per_micro_batch=1)
    _, expected = train("whole", settings)
    forward, calls = LlamaModel.forward, iter(range(1000))

    def once(self: Any, *arguments: Any, **keywords: Any) -> Any:
        result = forward(self, *arguments, **keywords)
        if self.training and keywords.get("input_ids", torch.zeros(1, 0)).shape[1] != 64 and next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(LlamaModel, "forward", once)
    facts, found = train("again", settings)
    assert facts["gradient_checkpointing"]
    for name, tensor in adapter(expected).items():
        torch.testing.assert_close(adapter(found)[name], tensor, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------- before it begins


def saved_bytes(model: PeftModel | PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> int:
    """What autograd keeps of a forward pass, weights left out, each storage once."""
    weights = {id(weight) for weight in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_loss(inner, input_ids, labels)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_what_a_token_needs_is_what_autograd_keeps_of_it(mode: str, dtype: torch.dtype, tiny_model: Load) -> None:
    model: Any = tiny_model("llama").to(dtype)
    model = add_lora(model, FAST, seed=0) if mode == "lora" else model.requires_grad_(True)
    mode_before = model.training
    needs = TrainingMemory.of(model, 0.5)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert needs.state == trained * (16 if mode == "lora" else 12)
    assert model.training == mode_before
    input_ids = torch.randint(3, 300, (3, 200))
    labels = torch.where(torch.arange(200) < 100, IGNORED, input_ids)
    model.train()
    kept = saved_bytes(model, input_ids, labels) / input_ids.numel()
    assert kept < needs.token < 1.3 * kept
    assert needs.recomputed_token < needs.token / 2


MEMORY = TrainingMemory(state=1000, token=10, recomputed_token=1)


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (1000 + 163_840, MicroBatches(16_384, False)),
        (1000 + 163_839, MicroBatches(8192, False)),
        (1000 + 20_480, MicroBatches(2048, False)),
        (1000 + 20_479, MicroBatches(16_384, True)),  # small micro-batches cost more than a third forward pass
        (1000 + 8191, MicroBatches(4096, True)),
        (1000 + 1024, MicroBatches(1024, True)),
        (0, MicroBatches(512, True)),  # as small as it gets: the records have up to 446 tokens
    ],
)
def test_the_largest_micro_batch_that_fits(room: int, expected: MicroBatches) -> None:
    assert MEMORY.fitting(FAST, 16_384, 446, room) == expected


@given(
    room=st.integers(0, 400_000), longest=st.integers(1, 40_000), tokens=st.none() | st.integers(1, 40_000),
    recomputes=st.none() | st.booleans(), most=st.sampled_from([2048, 16_384]),
)  # fmt: skip
def test_what_is_set_stays_and_more_room_never_means_less(
    room: int, longest: int, tokens: int | None, recomputes: bool | None, most: int
) -> None:
    settings = replace(FAST, tokens_per_micro_batch=tokens, gradient_checkpointing=recomputes)
    found, roomier = (MEMORY.fitting(settings, most, longest, size) for size in (room, room + 1000))
    assert found.tokens == tokens or (tokens is None and 0 < found.tokens <= most)
    assert recomputes is None or found.recomputes == recomputes
    assert found.recomputes >= roomier.recomputes
    if found.recomputes == roomier.recomputes:
        assert found.tokens <= roomier.tokens
    if recomputes is None and not found.recomputes and tokens is None:
        assert found.tokens >= min(FEWEST_TOKENS, most)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how many bytes there are for a training."""
    return lambda size: monkeypatch.setattr(run, "room_for_training", lambda device, weights: size)


def test_a_training_that_goes_on_keeps_its_micro_batches(
    train: Callable[..., Any],
    little_room: Callable[[float], None],
    tiny_model: Load,
    records: TokenizedRecords,
    tmp_path: Path,
) -> None:
    little_room(1.0)
    facts, directory = train("first")
    assert (facts["tokens_per_micro_batch"], facts["gradient_checkpointing"]) == (64, True)
    assert not (directory / MICRO_BATCHES).exists()
    around = TrainingSite(tmp_path, {"accelerator": "cpu", "devices": 1}, "training")
    model = add_lora(tiny_model("llama"), FAST, seed=0)
    begun = MicroBatches(77, False)  # where there was another room
    (tmp_path / MICRO_BATCHES).write_text(json.dumps(asdict(begun)))
    (tmp_path / CHECKPOINT).touch()
    assert choose_micro_batches(model, records, range(10), FAST, around) == begun
    (tmp_path / CHECKPOINT).unlink()  # killed before anything was kept, perhaps for lack of memory
    assert choose_micro_batches(model, records, range(10), FAST, around) == MicroBatches(64, True)


def test_measuring_leaves_model_and_generators_alone(tiny_model: Load) -> None:
    model = tiny_model("llama")
    assert isinstance(model, LlamaForCausalLM)
    wrapped = add_lora(model, replace(FAST, lora_dropout=0.5), seed=0)
    state = torch.get_rng_state()
    TrainingMemory.of(wrapped, 0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in wrapped.parameters())


def test_what_lack_of_memory_led_to_is_resumed_too(tiny_model: Load) -> None:
    def module() -> TuningModule:
        return TuningModule(add_lora(tiny_model("llama"), FAST, seed=0), FAST, total_steps=4)

    first, second = module(), module()
    first.parts = 4
    first.recompute_activations()
    checkpoint: dict[str, Any] = {}
    first.on_save_checkpoint(checkpoint)
    second.on_load_checkpoint(checkpoint)
    assert (second.parts, second.recomputes) == (4, True)
    assert second.causal_lm.model.gradient_checkpointing


def test_weights_take_the_room_of_their_device(tiny_model: Load) -> None:
    model = tiny_model("llama")
    whole = sum(weight.nbytes for weight in model.parameters())
    assert weight_bytes(model, torch.device("cpu")) == whole
    assert weight_bytes(model, torch.device("cuda")) == whole  # it will be there
    model.hf_device_map = {"": "cpu"}
    assert weight_bytes(model, torch.device("cuda", 0)) == 0
    free = room_for_training(torch.device("cpu"), 0)
    assert room_for_training(torch.device("cpu"), whole) == free - whole


def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(memory, "LIMITS", [tmp_path / "absent", tmp_path / "none", tmp_path / "limit"])
    assert room_for_training(torch.device("cpu"), 0) == 800_000
