"""What models of many classes compute is what our losses say: one comparison at loading decides about the shortcut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tiny_models import build_tiny_tokenizer
from trim_lightning.engine.gradients import record_gradients
from trim_lightning.errors import UserError
from trim_lightning.models.check import check_model
from trim_lightning.models.load import load_model
from trim_lightning.models.loss import IGNORED, head_alone, last_hidden_states, record_losses, summed_loss
from trim_lightning.models.source import find_model
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.store import Store

SHARED = {
    "vocab_size": 360, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 360}
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip
BERT = {name: value for name, value in SHARED.items() if name not in ("num_key_value_heads", "head_dim")}
# model type, settings besides the shared ones, whether logits are the output embedding of the last hidden states alone
CLASSES: list[tuple[str, dict[str, Any], bool]] = [
    ("llama", {}, True),
    ("mistral", {"sliding_window": 8}, True),
    ("qwen2", {}, True),
    ("qwen3", {}, True),
    ("gemma3_text", {"sliding_window": 8}, True),
    ("phi3", {}, True),
    ("olmo2", {}, True),
    ("stablelm", {}, True),
    ("gpt_neox", {}, True),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}, True),
    ("gpt2", GPT2, True),
    ("deepseek_v3", MLA, True),
    ("mixtral", {"num_local_experts": 4}, True),
    ("granite", {}, True),
    ("granite", {"logits_scaling": 6.0}, False),
    ("cohere", {}, False),
    ("cohere2", {"sliding_window": 8}, False),
    ("nanochat", {}, False),
    ("modernbert-decoder", {"local_attention": 8}, False),
    ("llama4_text", {"num_local_experts": 2, "interleave_moe_layer_step": 1}, True),
    ("bert", {**BERT, "is_decoder": True}, False),
    ("roberta", {**BERT, "is_decoder": True}, False),
]
LOOKING_AHEAD = ["bert", "roberta", "electra", "xlm-roberta"]
Load = Callable[..., PreTrainedModel]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Saves a tiny random model of a class and loads it as the product does."""

    def make(model_type: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        config = AutoConfig.for_model(model_type, **(settings if settings in (GPT2,) else SHARED | settings))
        folder, draw = tmp_path / "model", torch.Generator().manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = 0.2 * torch.randn(parameter.shape, generator=draw)
                parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
        model.save_pretrained(folder)
        build_tiny_tokenizer().save_pretrained(folder)
        return load_model(find_model(ModelSettings(path=str(folder)), Store(tmp_path / "store")), dtype)

    return make


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences ``[2, 10]``, some of whose tokens are to be predicted."""
    ids = torch.randint(3, 360, (2, 10), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = IGNORED
    labels[1, 8:] = IGNORED
    return ids, labels


def own_losses(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits.float()
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return losses.sum(1)


@pytest.mark.parametrize(("model_type", "settings", "alone"), CLASSES)
def test_losses_are_the_models_own(model_type: str, settings: dict[str, Any], alone: bool, load: Load) -> None:
    model = load(model_type, settings)
    ids, labels = batch()
    with torch.no_grad():
        own = own_losses(model, ids, labels)
        torch.testing.assert_close(record_losses(model, ids, labels).float(), own, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(summed_loss(model, ids, labels), own.sum(), rtol=1e-5, atol=1e-4)
    assert head_alone(model) is alone
    assert last_hidden_states(model, ids).shape == (2, 10, 32 if model_type != "opt" else 16)


@pytest.mark.parametrize(("model_type", "settings", "alone"), [CLASSES[0], CLASSES[12], CLASSES[15], CLASSES[18]])
def test_in_bfloat16_too(model_type: str, settings: dict[str, Any], alone: bool, load: Load) -> None:
    model = load(model_type, settings, torch.bfloat16)
    assert head_alone(model) is alone
    ids, labels = batch()
    with torch.no_grad():
        torch.testing.assert_close(
            record_losses(model, ids, labels).float(), own_losses(model, ids, labels), rtol=1e-2, atol=1e-2
        )


def test_a_soft_cap_is_seen_in_either_format(load: Load) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not head_alone(load("gemma3_text", {"final_logit_softcapping": 30.0}, dtype))
        assert head_alone(load("gemma3_text", {"final_logit_softcapping": None}, dtype))


@pytest.mark.parametrize("model_type", LOOKING_AHEAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_ahead_is_refused(model_type: str, dtype: torch.dtype, load: Load) -> None:
    with pytest.raises(UserError, match=r"^model\.path=model: is not causal as it is loaded: .*; choose a") as caught:
        load(model_type, BERT, dtype)
    assert "\n" not in str(caught.value)


def test_gradients_go_through_the_models_own_head(load: Load) -> None:
    from peft import LoraConfig, get_peft_model

    model = load("modernbert-decoder", {"local_attention": 8})
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids, labels = batch()
    found: dict[str, torch.Tensor] = {}
    record_gradients(wrapped.get_base_model(), ids, labels, lambda name, gradients: found.update({name: gradients}))
    weights = {name: weight for name, weight in wrapped.get_base_model().named_parameters() if weight.requires_grad}
    own = own_losses(wrapped.get_base_model(), ids, labels)[0] / int((labels[0, 1:] != IGNORED).sum())
    for (name, weight), gradient in zip(weights.items(), torch.autograd.grad(own, list(weights.values())), strict=True):
        torch.testing.assert_close(found[name][0], gradient, rtol=1e-4, atol=1e-5)
        assert weight.shape == gradient.shape


def test_a_model_that_was_not_checked_is_run_as_it_is(load: Load) -> None:
    model = load("llama", {})
    del model.trim_head_alone
    ids, labels = batch()
    with torch.no_grad():
        torch.testing.assert_close(record_losses(model, ids, labels).float(), own_losses(model, ids, labels))


def test_logits_that_are_not_finite_say_nothing(load: Load) -> None:
    model = load("llama", {})
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    check_model(model, "model")
    assert not head_alone(model)
