"""Two processes train as one: weights, losses, checkpoints, whoever began and whoever goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trim_lightning.engine.response_loss import mean_response_loss
from trim_lightning.engine.spawned import run_spawned
from trim_lightning.errors import UserError
from trim_lightning.models.load import ModelRecipe
from trim_lightning.models.source import ModelSource
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.store.processes import ALONE, Processes
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.callbacks import EarlyStop
from trim_lightning.tuning.job import TrainingJob
from trim_lightning.tuning.lora_module import TuningModule

LORA = TuningSettings(
    epochs=2, batch_size=5, lora_rank=4, lora_alpha=8, lora_dropout=0.2, learning_rate=1e-2, gradient_clip=0.05,
    tokens_per_micro_batch=30, gradient_checkpointing=False,
)  # fmt: skip
FULL = replace(LORA, learning_rate=1e-3)
LENGTHS = (9, 4, 17, 6, 12, 11, 8, 15, 5, 7, 28)  # the last steps of the epochs have fewer micro-batches than processes
ONE = {"accelerator": "cpu", "devices": 1}
DDP = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
FSDP = {**DDP, "strategy": "fsdp"}


class Killed(Exception):
    """What stands in for a kill."""


@dataclass(frozen=True)
class Part:
    """One training of a series, cut off after ``steps`` if there is a number.

    In the second process memory runs out in the forward passes of the numbers in ``full``.
    """

    name: str
    job: TrainingJob
    steps: int | None = None
    full: tuple[int, ...] = ()


def run_parts(parts: list[Part], processes: Processes, logger: Any = False) -> dict[str, dict[str, Any]]:
    """Trainings one after the other, in processes that are started once for all of them."""
    facts: dict[str, dict[str, Any]] = {}
    torch.set_num_threads(1)
    for part in parts:
        step, losses = TuningModule.training_step, []

        def watched(self: TuningModule, batch: Any, place: int, *, part: Part = part, step: Any = step) -> None:
            if part.steps is not None and self.done.steps >= part.steps:
                raise Killed
            step(self, batch, place)
            losses.append(self.done.loss)  # noqa: B023

        learn, calls = TuningModule.learn_from, iter(range(10_000))

        def short(self: TuningModule, micro: Any, labels: int, *, part: Part = part, learn: Any = learn) -> None:
            learn(self, micro, labels)
            if processes.rank == 1 and next(calls) in part.full:  # noqa: B023
                raise torch.OutOfMemoryError("CUDA out of memory.")

        TuningModule.training_step, TuningModule.learn_from = watched, short  # type: ignore[method-assign]
        part.job.directory.mkdir(parents=True, exist_ok=True)
        try:
            facts[part.name] = {**part.job(processes, logger)[1], "losses": losses}
        except Killed:
            facts[part.name] = {"losses": losses}
        except UserError as error:
            facts[part.name] = {"error": str(error)}
        finally:
            TuningModule.training_step, TuningModule.learn_from = step, learn  # type: ignore[method-assign]
    return facts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainings")


@pytest.fixture(scope="module")
def records(root: Path) -> TokenizedRecords:
    folder = root / "tokens"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 300, (length,), generator=generator, dtype=torch.int32) for length in LENGTHS]
    torch.cat(ids).numpy().tofile(folder / "token_ids.int32")
    roles = [torch.tensor([1] * 2 + [2] * (length - 2), dtype=torch.uint8) for length in LENGTHS]
    torch.cat(roles).numpy().tofile(folder / "roles.uint8")
    torch.tensor([0, *LENGTHS]).cumsum(0).numpy().tofile(folder / "offsets.int64")
    (folder / "summary.json").write_text(json.dumps({"truncated": 0, "unrendered": 0, "problems": []}))
    return TokenizedRecords(folder)


Make = Callable[..., TrainingJob]


@pytest.fixture(scope="module")
def job(tiny_source: Callable[[str], ModelSource], records: TokenizedRecords, root: Path) -> Make:
    def make(
        name: str, settings: TuningSettings = LORA, trainer: Any = ONE, model: str = "llama", **more: Any
    ) -> TrainingJob:
        recipe = ModelRecipe(tiny_source(model), torch.float32)
        return TrainingJob(recipe, records, range(len(records)), settings, root / name, trainer, name, 0, **more)

    return make


class Worse:
    """A held-out loss that is lowest after the first epoch, whatever was learned."""

    def __init__(self, records: TokenizedRecords) -> None:
        self.records, self.calls = records, 0

    def __call__(self, model: Any) -> float:
        self.calls += 1
        return mean_response_loss(model, self.records, 40) + 10 * self.calls


OFTEN = {"checkpoint_seconds": 1e-9}


@pytest.fixture(scope="module")
def facts(job: Make, records: TokenizedRecords) -> dict[str, dict[str, Any]]:
    """Facts of all trainings, by name: in one process, then in two, then in one what two have begun."""
    full = {"options": {"mode": "full"}}
    often, worse = replace(LORA, **OFTEN), replace(LORA, epochs=4)
    alone = [
        Part("lora-1", job("lora-1")),
        Part("full-1", job("full-1", FULL, **full)),
        Part("epochs-1", job("epochs-1", checkpoints=True)),
        Part("tied-1", job("tied-1", replace(FULL, gradient_checkpointing=True), model="gemma3", **full)),
        Part("stop-1", job("stop-1", worse, early_stop=EarlyStop(1, Worse(records)))),
        Part("to-2", job("to-2", often), steps=3),
        Part("to-fsdp", job("to-fsdp", replace(FULL, **OFTEN), **full), steps=3),
    ]
    together = [
        Part("lora-2", job("lora-2", trainer=DDP)),
        Part("full-2", job("full-2", FULL, DDP, **full)),
        Part("epochs-2", job("epochs-2", trainer=DDP, checkpoints=True)),
        Part("stop-2", job("stop-2", worse, DDP, early_stop=EarlyStop(1, Worse(records)))),
        Part("to-2 resumed", job("to-2", often, DDP)),
        Part("to-1", job("to-1", often, DDP), steps=3),
        Part("short-2", job("short-2", replace(FULL, gradient_checkpointing=None), DDP, **full), full=(1, 4)),
        Part("hot-2", job("hot-2", replace(LORA, learning_rate=1e30, gradient_clip=0.0, epochs=9), DDP)),
        Part("lora-fsdp", job("lora-fsdp", replace(LORA, gradient_checkpointing=None), FSDP)),
        Part("full-fsdp", job("full-fsdp", FULL, FSDP, **full)),
        Part("tied-fsdp", job("tied-fsdp", replace(FULL, gradient_checkpointing=True), FSDP, model="gemma3", **full)),
        Part("epochs-fsdp", job("epochs-fsdp", trainer=FSDP, checkpoints=True)),
        Part("stop-fsdp", job("stop-fsdp", worse, FSDP, early_stop=EarlyStop(1, Worse(records)))),
        Part("to-fsdp resumed", job("to-fsdp", replace(FULL, **OFTEN), FSDP, **full)),
        Part("from-fsdp", job("from-fsdp", replace(FULL, **OFTEN), FSDP, **full), steps=3),
    ]
    found = run_parts(alone, ALONE)
    found |= run_spawned(partial(run_parts, together), 2)
    resumed = [
        Part("to-1 resumed", job("to-1", often)),
        Part("from-fsdp resumed", job("from-fsdp", replace(FULL, **OFTEN), **full)),
    ]
    return found | run_parts(resumed, ALONE)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.rglob("*.safetensors"))
    assert files, directory
    return {f"{file.relative_to(directory)}:{name}": w for file in files for name, w in load_file(file).items()}


def assert_same(one: Path, two: Path) -> None:
    expected, found = weights(one), weights(two)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max()) <= 1e-5, name


SAME = ("steps", "tokens", "trained_tokens", "records", "tokens_per_micro_batch", "gradient_checkpointing")


@pytest.mark.parametrize(
    ("kind", "spread"),
    [*((kind, "2") for kind in ("lora", "full", "epochs", "stop")),
     *((kind, "fsdp") for kind in ("lora", "full", "tied", "epochs", "stop"))],
)  # fmt: skip
def test_two_processes_learn_what_one_does(
    kind: str, spread: str, facts: dict[str, dict[str, Any]], root: Path
) -> None:
    one, two = facts[f"{kind}-1"], facts[f"{kind}-{spread}"]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert len(one["losses"]) == one["steps"]
    assert {name: two[name] for name in SAME} == {name: one[name] for name in SAME}
    assert (one["processes"], two["processes"]) == (1, 2)
    assert_same(root / f"{kind}-1", root / f"{kind}-{spread}")
    assert not [path for path in (root / f"{kind}-{spread}").iterdir() if path.name.startswith(("resume", "."))]


def test_an_early_stop_is_the_same_for_all(facts: dict[str, dict[str, Any]]) -> None:
    assert facts["stop-2"]["steps"] == facts["stop-fsdp"]["steps"] == 2 * 3, "it stopped"


def test_a_process_that_runs_out_of_memory_repeats_its_part(facts: dict[str, dict[str, Any]], root: Path) -> None:
    assert facts["short-2"]["micro_batch_parts"] > 1
    assert facts["short-2"]["losses"] == pytest.approx(facts["full-1"]["losses"], abs=1e-5)
    assert_same(root / "full-1", root / "short-2")


def test_a_training_that_diverges_ends_for_all(facts: dict[str, dict[str, Any]]) -> None:
    assert "diverged at step" in facts["hot-2"]["error"]


@pytest.mark.parametrize(
    ("begun", "unbroken"), [("to-2", "lora-1"), ("to-1", "lora-1"), ("to-fsdp", "full-1"), ("from-fsdp", "full-1")]
)
def test_any_number_of_processes_goes_on(
    begun: str, unbroken: str, facts: dict[str, dict[str, Any]], root: Path
) -> None:
    losses = [facts[name]["losses"] for name in (begun, f"{begun} resumed")]
    assert list(map(len, losses)) == [3, 3]
    assert facts[f"{begun} resumed"]["steps"] == 6
    assert losses[0] + losses[1] == pytest.approx(facts[unbroken]["losses"], abs=1e-5)
    assert_same(root / unbroken, root / begun)
