"""What only a GPU can show; `make gpu` runs these too, and TRIM_GPU_TESTS_ON_CPU=1 tries them on the CPU."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from trim_lightning.engine.devices import Resources, device_of
from trim_lightning.engine.gradients import GradientFeatures
from trim_lightning.engine.memory import is_out_of_memory
from trim_lightning.engine.record_pass import run_record_pass
from trim_lightning.engine.scoring_pass import ScoringRequest, run_scoring_pass
from trim_lightning.engine.shards import gather_values
from trim_lightning.models.lora import add_lora
from trim_lightning.models.loss import last_hidden_states
from trim_lightning.models.precision import resolve_dtype
from trim_lightning.models.prefix import can_resume, states_after
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tuning.memory import room_for_training
from trim_lightning.tuning.run import ADAPTER, CHECKPOINT, TrainingSite, train_model

pytestmark = pytest.mark.gpu


def small(card: Any, dtype: torch.dtype = torch.float32) -> Any:
    from gpu_materials import random_model

    return random_model(card.pick("small", "tiny"), card.device, dtype)


def records_of(card: Any, number: int, name: str = "records") -> Any:
    from gpu_materials import SHAPES, lengths_like_instructions, random_tokens

    vocabulary = SHAPES[card.pick("small", "tiny")]["vocab_size"]
    return random_tokens(card.work / name, lengths_like_instructions(number, 256), vocabulary)


def test_cpu_and_gpu_agree(card: Any) -> None:
    import gpu_checks

    result = gpu_checks.agree(card)
    assert result["ok"], result["float32"]


def test_memory_that_runs_out_changes_no_result(card: Any) -> None:
    import gpu_checks

    result = gpu_checks.out_of_memory(card)
    assert result["ok"], result["rows"]


def test_the_devices_own_error_is_lack_of_memory(card: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 46, dtype=torch.uint8, device=card.device)
    assert is_out_of_memory(caught.value)
    assert torch.ones(2, device=card.device).sum() == 2, "the device goes on"


def test_the_default_is_the_gpu_and_bfloat16_where_it_has_it(card: Any) -> None:
    if card.on_gpu:
        assert device_of({"accelerator": "auto", "devices": 1}).type == "cuda"
        assert (resolve_dtype("auto") == torch.bfloat16) == (torch.cuda.get_device_capability()[0] >= 8)


def test_batches_made_by_other_processes_give_the_same_bytes(card: Any, tmp_path: Path) -> None:
    """On a GPU two processes make batches in pinned memory unless told otherwise."""
    from materials import bank_for

    model, records = small(card), records_of(card, 100)
    bank, written = bank_for(model, 40), []
    for workers in (0, 2):
        folder = tmp_path / f"workers-{workers}"
        folder.mkdir()
        request = {folder: ScoringRequest({"": bank}, "embedding", "all")}
        run_scoring_pass(model, records, request, resources=Resources(card.trainer, 4096, workers))
        written.append({path.name: path.read_bytes() for path in folder.glob("similarity-*.safetensors")})
    assert written[0]
    assert written[0] == written[1]


def test_a_shared_prefix_gives_the_states_of_whole_records(card: Any) -> None:
    """On a GPU the rest of a record meets the prefix's keys in another kernel than a whole record's."""
    model = small(card)
    ids = torch.randint(10, 200, (6, 300), generator=torch.Generator().manual_seed(0)).to(model.device)
    ids[:, :200] = ids[0, :200].clone()
    assert can_resume(model)
    with torch.inference_mode():
        whole, resumed = last_hidden_states(model, ids), states_after(model, ids, 200)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))


def test_room_for_training_counts_what_this_process_can_have_again(card: Any) -> None:
    before = room_for_training(card.device, 0)
    held = torch.empty(1 << 30 if card.on_gpu else 1 << 10, dtype=torch.uint8, device=card.device)
    during = room_for_training(card.device, 0)
    del held
    after = room_for_training(card.device, 0)
    assert during == pytest.approx(before, rel=0.02)
    assert after == pytest.approx(before, rel=0.02)


def test_features_of_less_are_those_of_the_cpu_and_come_again(card: Any, tmp_path: Path) -> None:
    """The sketch adds in a fixed order: two passes on the GPU agree to float16's last digit."""
    records, found = records_of(card, 24), []
    for name, trainer in (("cpu", {"accelerator": "cpu", "devices": 1}), ("one", card.trainer), ("two", card.trainer)):
        model: Any = add_lora(small(card), TuningSettings(lora_rank=8, lora_dropout=0.0), 0).get_base_model()
        draw = torch.Generator().manual_seed(1)
        for weight_name, weight in model.named_parameters():
            if "lora_B" in weight_name:
                weight.data.copy_(0.05 * torch.randn(weight.shape, generator=draw))
        folder = tmp_path / name
        folder.mkdir()
        if name == "cpu":
            model = model.cpu()
        model.eval().requires_grad_(False)
        run_record_pass(
            model, records, GradientFeatures(512, 0), folder, scope="all",
            resources=Resources(trainer, 2048, 0), title="less",
        )  # fmt: skip
        found.append(gather_values(folder, len(records)))
    assert np.abs(found[0]).max() > 0.01
    np.testing.assert_allclose(found[1], found[0], atol=2e-3)
    np.testing.assert_allclose(found[2], found[1], atol=1e-3)


class Cut(Callback):
    """Ends a training, as a kill would, after so many micro-batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            raise RuntimeError("cut")


def test_a_training_that_was_cut_ends_as_an_unbroken_one(card: Any, tmp_path: Path) -> None:
    """Dropout on the GPU has a generator of its own, which the checkpoint keeps."""
    records = records_of(card, 24)
    settings = TuningSettings(
        epochs=2, batch_size=4, lora_rank=4, lora_dropout=0.3, learning_rate=1e-3, checkpoint_seconds=1e-9,
        tokens_per_micro_batch=2048, gradient_checkpointing=False,
    )  # fmt: skip

    def train(name: str, *callbacks: Callback) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        site = TrainingSite(folder, card.trainer, "training", callbacks=callbacks)
        train_model(small(card), records, range(24), settings, site, seed=0)
        return load_file(folder / ADAPTER / "adapter_model.safetensors")

    whole = train("whole")
    with suppress(RuntimeError):
        train("cut", Cut(5))
    assert (tmp_path / "cut" / CHECKPOINT).exists()
    for name, weight in train("cut").items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-4, atol=1e-6)
