"""A checkpoint after every epoch: the weights and moments that training had there, whatever a kill did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from trim_lightning.engine.adam_moments import FILE, AdamMoments
from trim_lightning.errors import UserError
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning import lora_module
from trim_lightning.tuning.callbacks import EpochCheckpoints, checkpoint_path
from trim_lightning.tuning.run import ADAPTER, TrainingSite, train_checkpoints, train_model

SETTINGS = TuningSettings(
    epochs=3, batch_size=4, lora_rank=4, lora_alpha=8, lora_dropout=0.2, learning_rate=1e-2, warmup_ratio=0.2,
    tokens_per_micro_batch=30, checkpoint_seconds=1e-9,
)  # fmt: skip
LENGTHS = (9, 4, 17, 6, 12, 11, 8, 15, 5, 7)
CPU = {"accelerator": "cpu", "devices": 1}


@pytest.fixture
def records(tokenized: Callable[..., TokenizedRecords]) -> TokenizedRecords:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    return tokenized([(part, [1] * 2 + [2] * (len(part) - 2)) for part in ids])


@pytest.fixture
def train(
    tiny_model: Callable[[str], PreTrainedModel], records: TokenizedRecords, tmp_path: Path
) -> Callable[..., Any]:
    def start(name: str) -> tuple[Path, dict[str, Any]]:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        around = TrainingSite(directory, CPU, "warm-up")
        _, facts = train_checkpoints(tiny_model("llama"), records, range(10), SETTINGS, around, seed=0)
        return directory, facts

    return start


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.safetensors")}


def test_the_last_checkpoint_is_what_plain_training_ends_with(
    train: Callable[..., Any], tiny_model: Callable[[str], PreTrainedModel], records: TokenizedRecords, tmp_path: Path
) -> None:
    directory, facts = train("epochs")
    assert sorted(path.name for path in directory.iterdir()) == [f"checkpoint-{number:03d}" for number in (1, 2, 3)]
    around = TrainingSite(tmp_path / "plain", CPU, "training")
    around.directory.mkdir()
    _, plain = train_model(tiny_model("llama"), records, range(10), SETTINGS, around, seed=0)
    name = "adapter_model.safetensors"
    assert (checkpoint_path(directory, 3) / name).read_bytes() == (around.directory / ADAPTER / name).read_bytes()
    assert (checkpoint_path(directory, 2) / name).read_bytes() != (around.directory / ADAPTER / name).read_bytes()
    assert facts["steps"] == plain["steps"] == 9


def test_moments_are_those_of_the_gradients_seen_so_far(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's running means, added up anew from the gradients of every step."""
    gradients: list[list[torch.Tensor]] = []
    rates: list[float] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            (group,) = self.param_groups
            rates.append(group["lr"])
            gradients.append([weight.grad.double().clone() for weight in group["params"]])
            return super().step(closure)

    monkeypatch.setattr(lora_module, "AdamW", Watched)
    directory, facts = train("run")
    assert facts["rates"] == pytest.approx([sum(rates[3 * epoch : 3 * epoch + 3]) / 3 for epoch in range(3)])
    for number in (1, 2, 3):
        moments = AdamMoments.load(checkpoint_path(directory, number) / FILE)
        assert (moments.step, moments.beta1, moments.beta2, moments.eps) == (3 * number, 0.9, 0.999, 1e-8)
        names = list(load_file(checkpoint_path(directory, number) / "adapter_model.safetensors"))
        assert len(moments.first) == len(moments.second) == len(names) == len(gradients[0])
        expected = torch.zeros(2, dtype=torch.float64)
        for step, seen in enumerate(gradients[: moments.step]):
            after = moments.step - 1 - step
            expected[0] += sum(0.1 * 0.9**after * float(part.sum()) for part in seen)
            expected[1] += sum(0.001 * 0.999**after * float(part.square().sum()) for part in seen)
        assert sum(float(part.double().sum()) for part in moments.first.values()) == pytest.approx(
            float(expected[0]), rel=1e-4
        )
        assert sum(float(part.double().sum()) for part in moments.second.values()) == pytest.approx(
            float(expected[1]), rel=1e-4
        )


def test_the_step_is_the_one_that_torchs_adam_takes(train: Callable[..., Any]) -> None:
    directory, _ = train("run")
    moments = AdamMoments.load(checkpoint_path(directory, 2) / FILE)
    generator = torch.Generator().manual_seed(0)
    for name in list(moments.first)[:4]:
        shape = moments.first[name].shape
        gradients = torch.randn(3, *shape, generator=generator) * 0.01
        expected = []
        for gradient in gradients:
            weight = torch.nn.Parameter(torch.zeros(shape))
            optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
            optimizer.state[weight] = {
                "step": torch.tensor(float(moments.step)),
                "exp_avg": moments.first[name].clone(),
                "exp_avg_sq": moments.second[name].clone(),
            }
            weight.grad = gradient.clone()
            optimizer.step()
            expected.append(-weight.detach())
        torch.testing.assert_close(moments.precondition(name, gradients), torch.stack(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_killed_warm_up_leaves_the_checkpoints_of_an_unbroken_one(
    after: int, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = files(train("unbroken")[0])
    saved = []
    real = EpochCheckpoints.on_train_batch_end

    def die(self: EpochCheckpoints, *arguments: Any) -> None:
        real(self, *arguments)
        if len(list(self.directory.glob("checkpoint-*"))) == after and not saved:
            saved.append(after)
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(EpochCheckpoints, "on_train_batch_end", die)
        with pytest.raises(RuntimeError, match="killed"):
            train("killed")
    directory, facts = train("killed")
    assert files(directory) == expected
    assert facts["steps"] == 9
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]


def test_one_epoch_leaves_one_checkpoint(
    tiny_model: Callable[[str], PreTrainedModel], records: TokenizedRecords, tmp_path: Path
) -> None:
    single = replace(SETTINGS, epochs=1, schedule="constant", warmup_ratio=0.0)
    around = TrainingSite(tmp_path, CPU, "warm-up")
    _, facts = train_checkpoints(tiny_model("opt"), records, range(5), single, around, seed=1)
    assert facts["rates"] == pytest.approx([1e-2])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-001"]


def test_an_epoch_without_a_learning_rate_is_a_user_error(
    tiny_model: Callable[[str], PreTrainedModel], records: TokenizedRecords, tmp_path: Path
) -> None:
    slow, around = replace(SETTINGS, batch_size=10, warmup_ratio=0.4), TrainingSite(tmp_path, CPU, "warm-up")
    with pytest.raises(
        UserError, match=r"warmup\.warmup_ratio=0\.4: the learning rate of a whole epoch is 0; lower it"
    ):
        train_checkpoints(tiny_model("llama"), records, range(10), slow, around, seed=0)
