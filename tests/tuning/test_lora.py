"""LoRA training: gradients that do not depend on the cut, adapters that are safe, whole, effective and resumable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, PreTrainedModel

from trim_lightning.engine.labels import collate
from trim_lightning.errors import UserError
from trim_lightning.models.adapter import without_gradients
from trim_lightning.models.lora import add_lora
from trim_lightning.models.loss import IGNORED, summed_loss
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning import lora_module, run
from trim_lightning.tuning.callbacks import PeriodicCheckpoint
from trim_lightning.tuning.run import ADAPTER, CHECKPOINT, TrainingSite, train_model

Load = Callable[[str], PreTrainedModel]
FAST = TuningSettings(epochs=1, batch_size=4, lora_rank=4, lora_alpha=8, lora_dropout=0.0, learning_rate=1e-2)
LENGTHS = (9, 4, 17, 6, 12, 11, 8, 15, 5, 7)


@pytest.fixture
def records(tokenized: Callable[..., TokenizedRecords]) -> TokenizedRecords:
    """Ten records whose first third is the prompt; the last one has no response."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    roles = [[0] + [1] * (length // 3) + [2] * (length - length // 3 - 2) + [0] for length in LENGTHS[:-1]]
    return tokenized([*zip(ids, roles, strict=False), (ids[-1], [1] * LENGTHS[-1])])


class Steps:
    """What the optimiser saw at each step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []

    def norm(self, step: int) -> float:
        return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in self.gradients[step].values()))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Records the gradients and learning rate of every optimiser step."""
    seen = Steps()

    class Watched(AdamW):
        def step(self, closure: Any = None) -> Any:
            group = self.param_groups[0]
            seen.rates.append(group["lr"])
            seen.gradients.append({str(i): p.grad.detach().clone() for i, p in enumerate(group["params"])})
            return super().step(closure)

    monkeypatch.setattr(lora_module, "AdamW", Watched)
    return seen


@pytest.fixture
def train(tiny_model: Load, records: TokenizedRecords, tmp_path: Path) -> Callable[..., Any]:
    """Trains a fresh tiny model; gives the PEFT model, the facts and the directory."""

    def start(
        settings: TuningSettings = FAST,
        *,
        name: str = "run",
        model: PreTrainedModel | None = None,
        rows: range = range(10),
        seed: int = 0,
    ) -> tuple[PeftModel, dict[str, Any], Path]:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        around = TrainingSite(directory, {"accelerator": "cpu", "devices": 1}, "training")
        wrapped, facts = train_model(model or tiny_model("llama"), records, rows, settings, around, seed=seed)
        return wrapped, facts, directory

    return start


def adapter_bytes(directory: Path) -> bytes:
    return (directory / ADAPTER / "adapter_model.safetensors").read_bytes()


def logits(model: Any, records: TokenizedRecords) -> torch.Tensor:
    input_ids, _ = collate(records, [2])
    with torch.inference_mode():
        return model(input_ids=input_ids).logits


# ------------------------------------------------------------------------------------------- fresh LoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_lora_matrices_are_trained_and_in_float32(dtype: torch.dtype, tiny_model: Load) -> None:
    model = tiny_model("llama").to(dtype)
    wrapped = add_lora(model, FAST, seed=0)
    trainable = {name: part for name, part in wrapped.named_parameters() if part.requires_grad}
    assert len(trainable) == 4 * 4 * 2  # layers, projections, A and B
    for name, part in trainable.items():
        assert "lora_" in name
        assert part.dtype == torch.float32
        assert ("lora_B" in name) == bool((part == 0).all()), "a fresh adapter changes nothing"


def test_the_first_matrices_follow_the_seed(tiny_model: Load) -> None:
    def first(seed: int) -> torch.Tensor:
        wrapped = add_lora(tiny_model("llama"), FAST, seed)
        return torch.cat([part.flatten() for name, part in wrapped.named_parameters() if "lora_A" in name])

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_modules_that_the_model_lacks_are_left_out_or_refused_by_name(tiny_model: Load) -> None:
    wrapped = add_lora(tiny_model("opt"), FAST, seed=0)
    assert sorted(wrapped.peft_config["default"].target_modules) == ["k_proj", "out_proj", "q_proj", "v_proj"]
    with pytest.raises(UserError, match=r"lora_targets=query,wk: the model has none.*it has .*q_proj") as caught:
        add_lora(tiny_model("llama"), replace(FAST, lora_targets=["query", "wk"]), seed=0)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- loss and gradient


def test_the_loss_is_summed_over_labelled_tokens_alone(tiny_model: Load, records: TokenizedRecords) -> None:
    model = tiny_model("llama")
    input_ids, labels = collate(records, [0, 2, 5])
    with torch.inference_mode():
        log_probabilities = model(input_ids=input_ids).logits.double().log_softmax(-1)
        expected = -sum(
            float(log_probabilities[line, place - 1, labels[line, place]])
            for line in range(3)
            for place in range(1, labels.shape[1])
            if labels[line, place] != IGNORED
        )
        assert float(summed_loss(model, input_ids, labels)) == pytest.approx(expected, rel=1e-5)


def test_a_steps_gradient_does_not_depend_on_how_it_is_cut(train: Callable[..., Any], steps: Steps) -> None:
    losses = []
    for budget in (10_000, 40, 18, 1):  # from one micro-batch a step to one record a micro-batch
        settings = replace(FAST, batch_size=10, gradient_clip=0.0, tokens_per_micro_batch=budget)
        _, facts, _ = train(settings, name=str(budget))
        losses.append(facts["loss"])
        assert facts["steps"] == 1
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    whole, *others = steps.gradients
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-3
    for cut in others:
        for name, gradient in whole.items():
            torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)


def test_recomputed_activations_give_the_same_gradient(train: Callable[..., Any], steps: Steps) -> None:
    for checkpointing in (False, True):
        train(replace(FAST, gradient_checkpointing=checkpointing), name=str(checkpointing))
    half = len(steps.gradients) // 2
    for plain, recomputed in zip(steps.gradients[:half], steps.gradients[half:], strict=True):
        for name, gradient in plain.items():
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_to_the_norm_that_is_set(train: Callable[..., Any], steps: Steps) -> None:
    train(replace(FAST, gradient_clip=0.0))
    free = [steps.norm(step) for step in range(len(steps.gradients))]
    steps.gradients.clear()
    train(replace(FAST, gradient_clip=min(free) / 10), name="clipped")
    for step in range(len(steps.gradients)):
        assert steps.norm(step) == pytest.approx(min(free) / 10, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "ratio", "expected"),
    [
        ("linear", 0.0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 0.4, [0, 0.5, 1, 2 / 3, 1 / 3]),
        ("constant", 0.2, [0, 1, 1, 1, 1]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    schedule: str, ratio: float, expected: list[float], train: Callable[..., Any], steps: Steps
) -> None:
    train(replace(FAST, epochs=5, batch_size=10, schedule=schedule, warmup_ratio=ratio))
    assert steps.rates == pytest.approx([1e-2 * factor for factor in expected])


# ------------------------------------------------------------------------------------------ the training


def test_training_lowers_the_loss_and_leaves_the_base_model_alone(
    train: Callable[..., Any], tiny_model: Load, records: TokenizedRecords
) -> None:
    input_ids, labels = collate(records, range(9))
    base = tiny_model("llama")
    with torch.inference_mode():
        before = float(summed_loss(base, input_ids, labels))
    wrapped, facts, directory = train(replace(FAST, epochs=20))
    with torch.inference_mode():
        assert float(summed_loss(wrapped.get_base_model(), input_ids, labels)) < 0.7 * before
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped, records), logits(base, records))
    assert facts["steps"] == 20 * 3
    assert facts["tokens"] == 20 * sum(LENGTHS[:-1])
    assert facts["trained_tokens"] == 20 * int((labels[:, 1:] != IGNORED).sum())
    assert facts["records"] == 9
    assert not (directory / CHECKPOINT).exists()


def test_the_seed_decides_everything(train: Callable[..., Any]) -> None:
    settings = replace(FAST, lora_dropout=0.3, epochs=2)
    runs = {name: adapter_bytes(train(settings, name=name, seed=seed)[2]) for name, seed in (("a", 0), ("b", 0))}
    assert runs["a"] == runs["b"]
    assert adapter_bytes(train(settings, name="c", seed=1)[2]) != runs["a"]
    assert adapter_bytes(train(replace(settings, lora_dropout=0.0), name="d")[2]) != runs["a"], "dropout is on"


def test_the_models_own_dropout_is_on_too(train: Callable[..., Any], tiny_model: Load) -> None:
    still = tiny_model("opt")
    for module in still.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    still_bytes = adapter_bytes(train(model=still, name="still")[2])
    assert adapter_bytes(train(model=tiny_model("opt"), name="moving")[2]) != still_bytes


def test_the_adapter_is_safetensors_and_plain_peft_loads_it_to_the_same_logits(
    train: Callable[..., Any], tiny_folder: Callable[[str], Path], records: TokenizedRecords
) -> None:
    wrapped, _, directory = train()
    files = {path.name for path in (directory / ADAPTER).iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".ckpt"))]
    tensors = load_file(directory / ADAPTER / "adapter_model.safetensors")
    assert all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    base = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(directory / ADAPTER))
    expected = logits(wrapped, records)
    torch.testing.assert_close(logits(loaded, records), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(without_gradients(loaded), records), expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------- refusals


def test_records_without_a_response_cannot_be_learned_from(train: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="training: none of the 1 records has a response to learn from"):
        train(rows=range(9, 10))


@pytest.mark.parametrize(
    "settings",
    [
        replace(FAST, learning_rate=1e-30),
        replace(FAST, batch_size=10, warmup_ratio=1.0),  # the one step has the rate 0
    ],
    ids=["tiny rate", "no step above rate 0"],
)
def test_an_adapter_that_changes_nothing_is_refused(settings: TuningSettings, train: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="training: the adapter changed nothing; raise the learning rate"):
        train(settings)


def test_an_adapter_that_was_zeroed_is_refused(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = run.fit

    def fit_and_zero(module: Any, *arguments: Any) -> dict[str, Any]:
        model = module.model
        facts = real(module, *arguments)
        with torch.no_grad():
            for name, part in model.named_parameters():
                if "lora_B" in name:
                    part.zero_()
        return facts

    monkeypatch.setattr(run, "fit", fit_and_zero)
    with pytest.raises(UserError, match="the adapter changed nothing"):
        train()


def test_a_loss_that_is_not_finite_ends_the_training_at_once(
    train: Callable[..., Any], tiny_model: Load, steps: Steps, tmp_path: Path
) -> None:
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"diverged at step 1 \(the loss is not finite\); lower the learning rate"):
        train(replace(FAST, epochs=5), model=broken)
    assert steps.gradients == []
    with pytest.raises(UserError, match=r"diverged"):
        train(replace(FAST, learning_rate=1e30, gradient_clip=0.0, epochs=50), name="hot")
    assert len(steps.gradients) < 5
    assert not (tmp_path / "run" / ADAPTER).exists()
    assert not (tmp_path / "hot" / ADAPTER).exists()


# ----------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def long_run() -> TuningSettings:
    """Six steps in more than six micro-batches, with dropout and a checkpoint after every step."""
    return replace(FAST, epochs=2, lora_dropout=0.2, tokens_per_micro_batch=30, checkpoint_seconds=1e-9)


@pytest.mark.parametrize("after", [1, 3, 5, 6])
def test_a_training_resumes_to_the_bytes_of_an_unbroken_one(
    after: int, long_run: TuningSettings, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    _, expected, unbroken = train(long_run, name="unbroken")
    assert len(steps.gradients) == 6
    steps.gradients.clear()
    saved = []

    def die(self: PeriodicCheckpoint, *arguments: Any) -> None:
        real(self, *arguments)
        if self.path.exists() and (not saved or self.path.stat().st_mtime_ns != saved[-1]):
            saved.append(self.path.stat().st_mtime_ns)
            if len(saved) == after:
                raise RuntimeError("killed")

    real = PeriodicCheckpoint.on_train_batch_end
    with monkeypatch.context() as patch:
        patch.setattr(PeriodicCheckpoint, "on_train_batch_end", die)
        with pytest.raises(RuntimeError, match="killed"):
            train(long_run, name="broken")
    assert len(steps.gradients) == after
    torch.manual_seed(12345)  # a new process has other generators
    _, facts, broken = train(long_run, name="broken")
    assert len(steps.gradients) == 6, "no step is taken twice"
    assert adapter_bytes(broken) == adapter_bytes(unbroken)
    assert facts["seconds"] > expected["seconds"] == 0, "the time before the kill"
    assert {**facts, "seconds": 0} == {**expected, "seconds": 0}
    assert sorted(path.name for path in broken.iterdir()) == [ADAPTER]


def test_a_kill_between_checkpoints_repeats_the_steps_since(
    long_run: TuningSettings, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    _, _, unbroken = train(long_run, name="unbroken")
    seen = []

    def save_once(self: PeriodicCheckpoint, trainer: Any, module: Any, outputs: Any, batch: Any, place: int) -> None:
        if not seen:
            real(self, trainer, module, outputs, batch, place)
        seen.append(place)
        if len(seen) == 4:
            raise RuntimeError("killed")

    real = PeriodicCheckpoint.on_train_batch_end
    with monkeypatch.context() as patch:
        patch.setattr(PeriodicCheckpoint, "on_train_batch_end", save_once)
        with pytest.raises(RuntimeError, match="killed"):
            train(long_run, name="broken")
    steps.gradients.clear()
    _, _, broken = train(long_run, name="broken")
    assert len(steps.gradients) == 5
    assert adapter_bytes(broken) == adapter_bytes(unbroken)
