"""Towers for images and sounds are not read where a text alone is wanted, and all else is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from census.tiny_classes import tiny_model
from census.verify import save
from trim_lightning.errors import UserError
from trim_lightning.models import load
from trim_lightning.models.load import load_model
from trim_lightning.models.parts import TOWER, towers
from trim_lightning.models.source import ModelSource, find_model
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.store import Store

COMPOSITE = ("gemma3", "gemma4", "mistral3", "qwen3_vl")
Made = Callable[[str], ModelSource]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A tiny composite model on disk."""

    def make(model_type: str) -> ModelSource:
        folder = save(tiny_model(model_type), tmp_path / model_type)
        return find_model(ModelSettings(path=str(folder)), Store(tmp_path / "store"))

    return make


def states(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a few tokens."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits
    return logits


@pytest.mark.parametrize("model_type", COMPOSITE)
def test_a_text_needs_no_weights_of_towers(model_type: str, made: Made) -> None:
    source = made(model_type)
    whole, lean = (load_model(source, torch.float32, whole=which) for which in (True, False))
    gone = {name for name in whole.state_dict() if any(TOWER.search(part) for part in name.split("."))}
    assert gone
    assert towers(whole)
    assert not towers(lean)
    assert type(lean) is type(whole)
    assert set(lean.state_dict()) == set(whole.state_dict()) - gone
    assert torch.equal(states(lean), states(whole))
    # a folder without the towers' weights
    file = source.directory / "model.safetensors"
    tensors = {name: each for name, each in load_file(file).items() if not TOWER.search(name)}
    assert len(tensors) < len(load_file(file))
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(states(load_model(source, torch.float32)), states(whole))
    with pytest.raises(UserError, match="weights are missing"):
        load_model(source, torch.float32, whole=True)


def test_a_model_that_misses_its_towers_on_a_text_is_read_whole(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made("gemma3")
    monkeypatch.setattr(load, "runs_on_text", lambda model: False)
    assert towers(load_model(source, torch.float32, whole=True))
    monkeypatch.setattr(load, "drop_towers", lambda model: None)
    assert towers(load_model(source, torch.float32))


def test_damaged_weights_are_told_as_of_any_model(made: Made) -> None:
    source = made("mistral3")
    file: Any = source.directory / "model.safetensors"
    tensors = {name: each for name, each in load_file(file).items() if "layers.0" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights are missing from its safetensors files") as caught:
        load_model(source, torch.float32)
    assert "\n" not in str(caught.value)
