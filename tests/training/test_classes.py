"""Classes that people tune, tiny and random, through selection, warm-up, training, resume and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from census.tiny_classes import tiny_model
from census.verify import save
from running import run_train
from training.conftest import TrainingFiles
from trim_lightning.cli.export import main as export

CLASSES = {  # model type: layers with softmax attention; None where that is all of them
    "qwen3_5": [3],
    "gpt_oss": None,
    "gemma2": None,
    "gemma3": None,
    "gemma4": None,
    "llama4": None,
    "olmo_hybrid": [3],
    "granitemoehybrid": [1, 3],
    "deepseek_v3": None,
    "falcon": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CLASSES)
def test_a_class_goes_all_the_way(
    model_type: str, training_files: TrainingFiles, power_cut: Callable[[int], Any], tmp_path: Path
) -> None:
    folder = save(tiny_model(model_type), tmp_path / "model")
    overrides = [
        *training_files.select, f"model.path={folder}", "warmup=lora", "warmup.fraction=0.4", "warmup.epochs=1",
        "warmup.checkpoint_seconds=0.00001", "warmup.learning_rate=0.01", training_files.held_out("plain"),
    ]  # fmt: skip
    with power_cut(1):  # in the warm-up
        run_train(*overrides, output_dir=tmp_path / "broken", store_dir=tmp_path / "store")
    training = run_train(*overrides, output_dir=tmp_path / "run", store_dir=tmp_path / "store")
    manifests = {file.parent: json.loads(file.read_text()) for file in training.directory.rglob("manifest.json")}
    ((place, manifest),) = ((place, each) for place, each in manifests.items() if "fingerprint" in each["stages"])
    layers = (manifest["stages"]["fingerprint"].get("attention") or {}).get("layers")
    assert layers == CLASSES[model_type]
    told = "Saliency is from the softmax attention of layer"
    assert (told in (place / "report.html").read_text(encoding="utf-8")) is (layers is not None)
    assert manifest["stages"]["warmup"]["lora"]["parameters"] > 0
    assert (training.directory / "adapter" / "adapter_model.safetensors").is_file()
    assert training.metrics["eval/nll"] != training.metrics["eval/nll_before"]
    assert export([str(training.directory), "--format", "messages"]) == 0
    exported = training.directory / "export" / "messages" / "messages.jsonl"
    assert len(exported.read_text().splitlines()) == 10
