"""Models go from memory with their last user: a sweep's jobs, one after the other, hold one model at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from running import run_select, run_train
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.response_loss import run_loss_pass
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tokens.spans import PROMPT, RESPONSE
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.run import TrainingSite, train_model

CPU = {"accelerator": "cpu", "devices": 1}


@pytest.fixture
def records(tokenized: Callable[..., TokenizedRecords]) -> TokenizedRecords:
    return tokenized([(range(5, 25), [PROMPT] * 8 + [RESPONSE] * 12) for _ in range(6)])


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only what nothing refers to any more is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_trained_model_is_freed_with_its_last_reference(
    tiny_model: Callable[[str], PreTrainedModel], records: TokenizedRecords, tmp_path: Path, no_collector: None,
    mode: str,
) -> None:  # fmt: skip
    model = tiny_model("llama")
    gone = weakref.ref(model)
    settings = TuningSettings(epochs=1, batch_size=2)
    trained, _ = train_model(model, records, range(6), settings, TrainingSite(tmp_path, CPU, "t"), seed=0, mode=mode)
    del model, trained
    assert gone() is None


def test_a_pass_leaves_the_model_to_its_owner(
    tiny_model: Callable[[str], PreTrainedModel], records: TokenizedRecords, tmp_path: Path, no_collector: None
) -> None:
    model = tiny_model("llama")
    gone = weakref.ref(model)
    run_loss_pass(model, records, tmp_path, resources=Resources(CPU, 500, None))
    del model
    assert gone() is None


def models_alive() -> int:
    return sum(isinstance(item, PreTrainedModel) for item in gc.get_objects())


def test_jobs_of_a_sweep_leave_no_model_behind(
    tiny_folder: Callable[[str], Path], pool_file: Path, target_file: Path, tmp_path: Path, no_collector: None
) -> None:
    before = models_alive()
    common = (
        "model=hf", f"model.path={tiny_folder('llama')}", "model.dtype=float32", "pool=jsonl", f"pool.path={pool_file}",
        "target=jsonl", f"target.path={target_file}", "saliency.num_layers=2", "selection.count=10",
        "warmup.learning_rate=0.01", "logger=none", "trainer=cpu",
    )  # fmt: skip
    for method in ("trim", "rds", "less"):
        run_select(f"method={method}", *common, output_dir=tmp_path / method, store_dir=tmp_path / "store")
        assert models_alive() == before, method
    held_out = (f"evaluation.path={target_file}", "train.learning_rate=0.01")
    run_train("method=random", *common, *held_out, output_dir=tmp_path / "train", store_dir=tmp_path / "store")
    assert models_alive() == before
