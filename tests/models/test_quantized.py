"""Linear layers in 4 and 8 bits: what is kept so, that passes and trainings compute the same, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import trim_lightning
from trim_lightning.errors import UserError
from trim_lightning.models.adapter import apply_adapter
from trim_lightning.models.load import ModelRecipe, load_model
from trim_lightning.models.lora import add_lora, save_adapter
from trim_lightning.models.loss import summed_loss
from trim_lightning.models.low_rank import LowRankBeside
from trim_lightning.models.precision import is_quantized
from trim_lightning.models.source import ModelSource, find_model
from trim_lightning.settings.schema import ModelSettings, TuningSettings
from trim_lightning.store import Store

pytest.importorskip("bitsandbytes")
LORA = TuningSettings(lora_rank=4, lora_alpha=8, lora_dropout=0.0)
IDS = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0))

Load = Callable[..., PreTrainedModel]


@pytest.fixture(params=["4bit", "8bit"])
def bits(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def load(tiny_source: Callable[[str], ModelSource]) -> Load:
    """``load(bits, architecture="llama", dtype=float32)``."""

    def model(bits: str | None, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return load_model(replace(tiny_source(architecture), quantize=bits), dtype)

    return model


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the differences over that of the expected numbers."""
    return float((found - expected).norm() / expected.norm())


def filled(model: Any) -> Any:
    """The model with LoRA that does something."""
    wrapped = add_lora(model, LORA, seed=0)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return wrapped


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_linear_layers_alone_are_quantised(bits: str, architecture: str, load: Load) -> None:
    model, plain = load(bits, architecture), load(None, architecture)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            whole = plain.get_submodule(name)
            assert not module.weight.is_floating_point(), name
            assert module.weight.nbytes * (8 if bits == "4bit" else 4) == whole.weight.nbytes, name
            states = torch.randn(64, whole.in_features, generator=torch.Generator().manual_seed(0))
            error = distance(module(states), whole(states))
            assert 0 < error < (0.12 if bits == "4bit" else 0.01), name
    assert model.dtype == torch.float32
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    if bits == "8bit":  # four layers of random weights make more of an error than trained ones do
        assert 0 < distance(logits(model), logits(plain)) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_and_trainings_compute_the_same(bits: str, dtype: torch.dtype, load: Load) -> None:
    wrapped = filled(load(bits, dtype=dtype))
    inner = wrapped.get_base_model()
    labels = IDS.clone()

    def gradients() -> tuple[float, dict[str, torch.Tensor]]:
        wrapped.zero_grad()
        loss = summed_loss(inner, IDS, labels)
        loss.backward()
        return float(loss.detach()), {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.requires_grad}

    before = logits(inner)
    wrapped.train()
    first, expected = gradients()
    torch.testing.assert_close(logits(inner), before, rtol=0, atol=0)
    wrapped.eval()
    torch.testing.assert_close(logits(inner), before, rtol=0, atol=0)
    second, found = gradients()
    assert second == first
    assert all(bool(gradient.any()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


def test_gradients_are_those_of_the_weights_as_they_are_kept(bits: str, load: Load) -> None:
    quantised, plain = filled(load(bits)), filled(load(None))
    for name, module in quantised.get_base_model().named_modules():
        if hasattr(module, "numbers"):
            plain.get_base_model().get_submodule(name).weight.data = module.numbers(torch.float32)
    found = {}
    for kind, wrapped in (("quantised", quantised), ("plain", plain)):
        wrapped.train()
        summed_loss(wrapped.get_base_model(), IDS, IDS).backward()
        found[kind] = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    for name, gradient in found["plain"].items():
        torch.testing.assert_close(found["quantised"][name], gradient, rtol=1e-4, atol=1e-4)


def test_a_record_has_the_same_logits_in_any_company(bits: str, load: Load) -> None:
    model = load(bits)
    with torch.no_grad():
        model.get_input_embeddings().weight[299] *= 100  # what LLM.int8 would call an outlier
    loud = torch.full_like(IDS[:1], 299)
    alone, beside = logits(model, IDS[:1]), logits(model, torch.cat([IDS[:1], loud]))[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_stays_beside_quantised_weights(bits: str, dtype: torch.dtype, load: Load, tmp_path: Path) -> None:
    wrapped = filled(load(bits, dtype=dtype))
    save_adapter(wrapped, tmp_path)
    expected = logits(wrapped)
    fast = apply_adapter(load(bits, dtype=dtype), tmp_path, gradients=False)
    assert sum(isinstance(module, LowRankBeside) for module in fast.modules()) == 16
    assert distance(logits(fast), expected) < (1e-6 if dtype == torch.float32 else 0.03)
    assert not torch.allclose(expected, logits(load(bits, dtype=dtype)), atol=0.1)


def test_an_adapters_folder_is_refused(bits: str, load: Load, tmp_path: Path) -> None:
    save_adapter(filled(load(bits)), tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"^model.quantize={bits}: model.path=.*adapter is an adapter, which goes"):
        find_model(ModelSettings(path=str(tmp_path / "adapter"), quantize=bits), Store(tmp_path / "store"))


def test_another_process_loads_the_same(bits: str, tiny_source: Callable[[str], ModelSource], load: Load) -> None:
    recipe = ModelRecipe(replace(tiny_source("llama"), quantize=bits), torch.float32)
    assert torch.equal(logits(recipe.load()), logits(load(bits)))


def test_python_loads_the_same(bits: str, tiny_folder: Callable[[str], Path], store_dir: Path) -> None:
    scorer = trim_lightning.load(str(tiny_folder("llama")), quantize=bits, dtype="float32", store_dir=store_dir)
    assert is_quantized(scorer.model)
    with pytest.raises(UserError, match=r"^quantize=2bit: must be one of 4bit, 8bit"):
        trim_lightning.load(str(tiny_folder("llama")), quantize="2bit", store_dir=store_dir)
