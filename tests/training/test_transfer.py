"""The scorer chooses, another model learns: ``train.model``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from running import run_train
from tiny_models import build_tiny_model
from training.conftest import TrainingFiles
from trim_lightning.models.source import ModelSource
from trim_lightning.pipeline.train import Training
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import Store
from trim_lightning.store.ledger import Ledger


def transfer(training_files: TrainingFiles, directory: Path, trainee: Path, *overrides: str) -> Training:
    return run_train(
        *training_files.select, f"train.model={trainee}", training_files.held_out("plain"), *overrides,
        output_dir=directory, store_dir=training_files.store,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["qwen2", "opt"])
def test_a_llama_chooses_for_another_architecture(
    architecture: str, training_files: TrainingFiles, tmp_path: Path
) -> None:
    trainee = build_tiny_model(architecture, tmp_path / f"tiny_{architecture}", seed=8)
    run = transfer(training_files, tmp_path / "run", trainee)
    inputs = run.manifest["inputs"]
    assert inputs["model"]["name"] == "model"
    assert inputs["trainee"]["name"] == f"tiny_{architecture}"
    assert inputs["model"]["sha256"] != inputs["trainee"]["sha256"]
    config = json.loads((run.directory / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"tiny_{architecture}"
    own = "out_proj" if architecture == "opt" else "o_proj"
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", own}
    assert run.metrics["eval/nll_drop"] > 0


def test_the_same_coreset_whoever_learns(training_files: TrainingFiles, tmp_path: Path) -> None:
    trainee = build_tiny_model("qwen2", tmp_path / "trainee")
    own = run_train(*training_files.select, output_dir=tmp_path / "own", store_dir=training_files.store)
    other = transfer(training_files, tmp_path / "other", trainee)
    coresets = [(run.directory / "selection" / "coreset.jsonl").read_bytes() for run in (own, other)]
    assert coresets[0] == coresets[1]
    stages = other.manifest["selection"]["stages"]
    assert all(record["cached"] for name, record in stages.items() if name != "select")


def test_the_trainee_brings_its_own_tokens(training_files: TrainingFiles, tmp_path: Path) -> None:
    """A trainee without a chat template reads the records in the plain form; its loss is that of the plain form."""
    trainee = build_tiny_model("qwen2", tmp_path / "plain_qwen2", chat_template=None)
    run = transfer(training_files, tmp_path / "run", trainee)
    tokenizer = AutoTokenizer.from_pretrained(trainee)
    model = AutoModelForCausalLM.from_pretrained(trainee, dtype=torch.float64)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(trainee, dtype=torch.float64), str(run.directory / "adapter")
    ).eval()
    record = json.loads((training_files.root / "plain.jsonl").read_text().splitlines()[0])
    line = json.loads((run.directory / "predictions.jsonl").read_text().splitlines()[0])
    prompt, response = (tokenizer(text)["input_ids"] for text in (record["prompt"] + "\n", record["response"]))
    assert line["num_tokens"] == len(response)
    for name, each in (("nll_before", model), ("nll", tuned)):
        with torch.no_grad():
            logits = each(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        loss = cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        assert line[name] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("accelerator", "cuda", "mps", "expected"),
    [
        ("auto", True, False, "cuda"),
        ("gpu", True, False, "cuda"),
        (None, True, False, "cuda"),
        ("cpu", True, True, "cpu"),
        ("auto", False, True, "mps"),
        ("auto", False, False, "cpu"),
    ],
)
def test_answers_are_generated_where_the_trainer_runs(
    accelerator: str | None,
    cuda: bool,
    mps: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tiny_source: Callable[[str], ModelSource],
    tmp_path: Path,
) -> None:
    """Lightning leaves a model on the CPU after its loop, where generation would take for ever."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    trainer = {} if accelerator is None else {"accelerator": accelerator}
    trainee = Trainee(tiny_source("llama"), "float32", Store(tmp_path), Ledger(), trainer=trainer, seed=0, max_length=9)
    assert trainee.device == torch.device(expected)
