"""The attention hook: the output of plain SDPA, the signals of eager attention, and a refusal for all else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from tiny_models import ARCHITECTURES, build_tiny_tokenizer
from trim_lightning.engine.modules import TargetPass
from trim_lightning.errors import UserError
from trim_lightning.models.attention import (
    NAME,
    SaliencyRecorder,
    hooked_attention,
    recording,
    register,
    visible_keys,
)
from trim_lightning.models.load import load_model
from trim_lightning.models.loss import last_hidden_states
from trim_lightning.models.source import find_model
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.store import Store

Load = Callable[[str], PreTrainedModel]
SMALL: dict[str, Any] = {
    "vocab_size": 360,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def input_ids(length: int = 30, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(seed))


def save(config: PreTrainedConfig, folder: Path) -> Path:
    """A random model of this config with a tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # far from uniform attention
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return load_model(find_model(ModelSettings(path=str(folder)), Store(folder / "store")), torch.float32)


def recorded(model: PreTrainedModel, ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and the two signals."""
    recorder = SaliencyRecorder(torch.tensor(lengths), model.config.num_hidden_layers)
    with torch.inference_mode(), recording(recorder):
        hidden = last_hidden_states(model, ids)
    return hidden, *recorder.signals()


def eager_signals(folder: Path, ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The signals from the whole attention matrices that transformers itself gives."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.inference_mode():
        layers = model.base_model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    rows, columns = (torch.zeros(len(layers), *ids.shape, dtype=torch.float64) for _ in range(2))
    for layer, attention in enumerate(layers):
        for b, n in enumerate(lengths):
            weights = attention[b, :, :n, :n].double()
            seen = (weights > 0).any(0)
            size = seen.sum(-1)
            entropy = -torch.special.xlogy(weights, weights).sum(-1)
            certain = torch.where(size > 1, 1 - entropy / size.clamp(min=2).log(), 0)
            rows[layer, b, :n] = certain.mean(0)
            columns[layer, b, :n] = (weights.sum(1) / seen.sum(0)).mean(0)
    return rows, columns


# -------------------------------------------------------------------------------------------- the output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_is_that_of_plain_sdpa(
    architecture: str, dtype: torch.dtype, tiny_folder: Callable[[str], Path]
) -> None:
    folder, ids = tiny_folder(architecture), input_ids()
    plain, hooked = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name, dtype=dtype).eval()
        for name in ("sdpa", register())
    )
    padding = torch.ones_like(ids)
    padding[1, 20:] = 0
    for mask in (None, padding):
        with torch.inference_mode():
            expected = plain(input_ids=ids, attention_mask=mask).logits
            got = hooked(input_ids=ids, attention_mask=mask).logits
            recorder = SaliencyRecorder(torch.tensor([30, 20]), hooked.config.num_hidden_layers)
            with recording(recorder):
                watched = hooked(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(got, expected)
        assert torch.equal(watched, expected)
        for signal in recorder.signals():
            assert signal.dtype == torch.float32
            assert torch.isfinite(signal).all()


def test_gradients_are_those_of_plain_sdpa(tiny_folder: Callable[[str], Path]) -> None:
    gradients = []
    for name in ("sdpa", register()):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), attn_implementation=name)
        model(input_ids=input_ids(), labels=input_ids()).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*gradients)


# ------------------------------------------------------------------------------------------- the signals


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_signals_are_those_of_eager_attention(
    architecture: str, tiny_folder: Callable[[str], Path], tiny_model: Load
) -> None:
    lengths = [30, 19]
    _, *signals = recorded(tiny_model(architecture), input_ids(), lengths)
    for got, expected in zip(signals, eager_signals(tiny_folder(architecture), input_ids(), lengths), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
        assert got.std() > 0.01


@pytest.mark.parametrize("config", [GPTNeoXConfig(**SMALL), Phi3Config(**SMALL)], ids=lambda c: c.model_type)
def test_other_architectures_of_the_interface_work_without_being_known(
    config: PreTrainedConfig, tmp_path: Path
) -> None:
    folder, lengths = save(config, tmp_path / "model"), [30, 30]
    _, *signals = recorded(load(folder), input_ids(), lengths)
    for got, expected in zip(signals, eager_signals(folder, input_ids(), lengths), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


def test_nothing_is_recorded_outside_the_block_or_after_an_error(tiny_model: Load) -> None:
    model = tiny_model("llama")
    recorder = SaliencyRecorder(torch.tensor([30, 30]), 4)
    with pytest.raises(RuntimeError, match="stop"), recording(recorder):
        raise RuntimeError("stop")
    with torch.inference_mode():
        last_hidden_states(model, input_ids())
    with pytest.raises(UserError, match="only 0 of the model's 4 layers"):
        recorder.signals()


# -------------------------------------------------------------------------------------------- the masks


def test_an_additive_mask_means_what_the_bool_mask_means() -> None:
    visible = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    assert visible_keys(visible) is visible
    for dtype in (torch.float32, torch.bfloat16):
        for lowest in (float("-inf"), torch.finfo(dtype).min):
            additive = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, lowest)
            assert torch.equal(visible_keys(additive), visible)


def test_a_mask_with_a_bias_or_a_mask_for_each_head_is_refused() -> None:
    additive = torch.zeros(1, 1, 3, 3)
    additive[0, 0, 2, 0] = -0.5
    with pytest.raises(UserError, match="the model uses a bias in its attention mask"):
        visible_keys(additive)
    with pytest.raises(UserError, match="the model uses a mask of its own for each head"):
        visible_keys(torch.ones(1, 4, 3, 3, dtype=torch.bool))


# ----------------------------------------------------------------------------------------- the refusals


def call(module: Any = None, **extra: Any) -> tuple[Tensor, None]:
    query, key = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
    return hooked_attention(module or nn.Module(), query, key, key, None, **extra)


@pytest.mark.parametrize(("argument", "name"), [("softcap", "soft-capping"), ("s_aux", "sinks")])
def test_attention_that_is_no_plain_softmax_is_refused(argument: str, name: str) -> None:
    assert call(**{argument: None})[0].shape == (1, 3, 2, 4)
    with pytest.raises(UserError, match=rf"the model uses {name} \({argument}\)") as caught:
        call(**{argument: 30.0})
    assert "\n" not in str(caught.value)


def test_attention_that_is_not_causal_is_refused_when_it_is_read() -> None:
    module = SimpleNamespace(layer_idx=0, is_causal=False)
    call(module)
    with recording(SaliencyRecorder(torch.tensor([3]), 1)), pytest.raises(UserError, match="that is not causal"):
        call(module)


def test_a_layer_that_reports_twice_is_refused() -> None:
    module = SimpleNamespace(layer_idx=0)
    with recording(SaliencyRecorder(torch.tensor([3]), 1)):
        call(module)
        with pytest.raises(UserError, match="more than one attention in a layer"):
            call(module)


class OwnAttention(nn.Module):
    """A layer's attention that never asks the interface."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        value = self.inner.v_proj(hidden_states).repeat(1, 1, 2)
        share = torch.ones(value.shape[1], value.shape[1]).tril()
        return self.inner.o_proj(share / share.sum(-1, keepdim=True) @ value), None


@pytest.mark.parametrize("bypassing", [[2], [0, 1, 2, 3]])
def test_a_model_whose_layers_bypass_the_interface_is_refused(bypassing: list[int], tiny_model: Load) -> None:
    model = tiny_model("llama")
    for layer in bypassing:
        model.model.layers[layer].self_attn = OwnAttention(model.model.layers[layer].self_attn)
    batch = {"input_ids": input_ids(), "lengths": torch.tensor([30, 30])}
    with torch.inference_mode(), pytest.raises(UserError) as caught:
        TargetPass(model).predict_step(batch, 0)
    assert f"only {4 - len(bypassing)} of the model's 4 layers" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_registering_again_does_no_harm(tiny_model: Load) -> None:
    assert register() == register() == NAME
    assert tiny_model("llama").config._attn_implementation == NAME
