"""A model that cannot be used is refused before a record is read, and is not loaded twice for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from census.tiny_classes import tiny_model
from census.verify import save
from composing import compose_select
from running import run_select, run_train
from training.conftest import TrainingFiles
from trim_lightning.engine.modules import TargetPass
from trim_lightning.errors import UserError
from trim_lightning.methods.base import load_selector
from trim_lightning.models import load
from trim_lightning.models.source import find_model
from trim_lightning.pipeline.opening import open_scorer
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.stages.attention import check_attention
from trim_lightning.stages.look import look_at
from trim_lightning.store import Store
from trim_lightning.store.ledger import Ledger

ENCODER = "is not causal as it is loaded: what BertLMHeadModel computes for a token depends on later ones"
NO_SALIENCY = "model: MambaForCausalLM has no softmax attention, so that saliency cannot be read; saliency=uniform"
MORE = "cannot run on a text alone"
LORA = "lora_targets=auto: the model has no attention to train"
PIECES = "the model uses weights of other things than its tokens"
NO_LAYERS = "config.json does not say how many layers the model has"
TWICE = "runs more than once in one pass of DoryForCausalLM"
FSDP = {"accelerator": "cpu", "devices": 2, "strategy": "fsdp"}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No record can be read."""

    def read(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("records are read")

    for module in ("pipeline.opening", "pipeline.training_inputs"):
        monkeypatch.setattr(f"trim_lightning.{module}.open_records", read)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("run", "model_type", "overrides", "told"),
    [
        (run_select, "bert", [], ENCODER),
        (run_select, "bert", ["method=rds"], ENCODER),
        (run_select, "mamba", [], NO_SALIENCY),
        (run_select, "mamba", ["saliency=uniform", "warmup=lora"], f"warmup.{LORA}"),
        (run_select, "gemma4_assistant", [], MORE),
        (run_select, "reformer", [], PIECES),
        (run_select, "musicgen", [], NO_LAYERS),
        (run_select, "dory", ["method=less", "warmup=lora"], TWICE),
        (run_train, "bert", [], ENCODER),
        (run_train, "mamba", ["train.mode=full"], NO_SALIENCY),
        (run_train, "mamba", ["saliency=uniform"], f"train.{LORA}"),
        (run_train, "bert", ["coreset.path={root}/coreset.jsonl"], ENCODER),
    ],
)
def test_a_class_is_refused_before_a_record_is_read(
    run: Callable[..., Any],
    model_type: str,
    overrides: list[str],
    told: str,
    training_files: TrainingFiles,
    tmp_path: Path,
) -> None:
    folder = save(tiny_model(model_type), tmp_path / "model")
    given = [
        *training_files.select,
        f"model.path={folder}",
        *(each.format(root=training_files.root) for each in overrides),
    ]
    own = [each for each in given if run is run_train or not each.startswith("train.")]
    with pytest.raises(UserError) as caught:
        run(*own, output_dir=tmp_path / "run", store_dir=tmp_path / "store")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_trainee_is_refused_by_its_own_key(training_files: TrainingFiles, tmp_path: Path) -> None:
    folder = save(tiny_model("bert"), tmp_path / "encoder")
    with pytest.raises(UserError, match=r"^train\.model=encoder: is not causal"):
        run_train(
            *training_files.train, f"train.model={folder}", output_dir=tmp_path / "run", store_dir=tmp_path / "store"
        )


def test_files_that_are_not_there_are_told_before_a_model_is_loaded(
    training_files: TrainingFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "from_files", None)
    for key, run in (("pool.path", run_select), ("target.path", run_select), ("pool.path", run_train)):
        own = [each for each in training_files.select if run is run_train or not each.startswith("train.")]
        with pytest.raises(UserError, match=rf"^{key}=nope.jsonl does not exist"):
            run(*own, f"{key}=nope.jsonl", output_dir=tmp_path / "run", store_dir=tmp_path / "store")


def test_the_look_costs_no_second_loading(
    training_files: TrainingFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, real = [], load.from_files

    def count(*arguments: Any, **keywords: Any) -> Any:
        loaded.append(arguments)
        return real(*arguments, **keywords)

    monkeypatch.setattr(load, "from_files", count)
    own = [each for each in training_files.select if not each.startswith("train.")]
    for name, overrides in (("none", []), ("lora", ["warmup=lora", "warmup.epochs=1"])):
        loaded.clear()
        run_select(*own, *overrides, output_dir=tmp_path / name, store_dir=tmp_path / f"store_{name}")
        assert len(loaded) == 1, name
    run_select(*own, "selection.count=3", output_dir=tmp_path / "again", store_dir=tmp_path / "store_none")
    assert len(loaded) == 1


def test_divided_weights_do_not_read_one_target_at_a_time(training_files: TrainingFiles, tmp_path: Path) -> None:
    folder, store = save(tiny_model("falcon"), tmp_path / "model"), Store(tmp_path / "store")
    own = [each for each in training_files.select if not each.startswith("train.")]
    paths = [f"paths.{name}_dir={tmp_path / name}" for name in ("output", "store")]
    settings = compose_select([*own, *paths, f"model.path={folder}", "saliency=uniform"])
    scorer = open_scorer(settings, load_selector(settings.method), store, Ledger(quiet=True))
    seen = look_at(scorer)
    check_attention(seen, settings, "model")
    told = "^trainer=fsdp: the attention of FalconForCausalLM is read one target at a time"
    with pytest.raises(UserError, match=told):
        check_attention(seen, replace(settings, trainer=FSDP), "model")
    forward = TargetPass(load.load_model(find_model(ModelSettings(path=str(folder)), store), torch.float32))
    batch = {"input_ids": torch.arange(3, 9)[None], "lengths": torch.tensor([6]), "rows": torch.tensor([0])}
    batch["roles"] = torch.zeros(1, 6)
    assert len(forward.on_batch(batch)) == 1
    forward.__dict__["_trainer"] = SimpleNamespace(strategy=object.__new__(ModelParallelStrategy))
    with pytest.raises(UserError, match=told):
        forward.on_batch(batch)
