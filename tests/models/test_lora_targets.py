"""Where LoRA goes: the attention of the language model, whatever its class calls it, and never a tower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_heads import GPT2, MLA, SHARED, batch, own_losses
from torch.optim import AdamW
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trim_lightning.engine.adam_moments import AdamMoments
from trim_lightning.engine.gradients import GradientFeatures, record_gradients
from trim_lightning.errors import UserError
from trim_lightning.models.lora import add_lora, lora_facts, lora_targets
from trim_lightning.models.loss import IGNORED
from trim_lightning.settings.schema import TuningSettings, WarmupSettings
from trim_lightning.stages.model import ModelHandle
from trim_lightning.store import StageKey, Store
from trim_lightning.store.ledger import Ledger

AUTO = TuningSettings(lora_rank=3, lora_dropout=0.0)
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def build(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A tiny random model of a class, frozen as the product loads it."""
    if model_type == "gemma3":
        text = SHARED | {"sliding_window": 8}
        config: Any = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=300)
    else:
        config = AutoConfig.for_model(model_type, **(settings if settings in (GPT2,) else SHARED | settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", {}, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}),
        ("qwen3", {}, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}),
        ("opt", {"ffn_dim": 48}, {"k_proj": 2, "v_proj": 2, "q_proj": 2, "out_proj": 2}),
        ("phi3", {}, {"o_proj": 2, "qkv_proj": 2}),
        ("gpt_neox", {}, {"query_key_value": 2, "dense": 2}),
        ("gpt2", GPT2, {"c_attn": 2, "c_proj": 2}),
        ("bloom", {"n_layer": 2, "n_head": 4}, {"query_key_value": 2, "dense": 2}),
        ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, {"Wqkv": 2, "out_proj": 2}),
        ("deepseek_v3", MLA, {"q_a_proj": 2, "q_b_proj": 2, "kv_a_proj_with_mqa": 2, "kv_b_proj": 2, "o_proj": 2}),
        ("modernbert-decoder", {}, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "Wo": 2}),
        ("gemma3", {}, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}),
        ("mixtral", {"num_local_experts": 4}, {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}),
        (
            "falcon_h1",
            {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
            {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2},
        ),
    ],
)
def test_auto_finds_the_attention_of_the_language_model(
    model_type: str, settings: dict[str, Any], expected: dict[str, int]
) -> None:
    wrapped = add_lora(build(model_type, settings), AUTO, seed=0)
    facts = lora_facts(wrapped, AUTO)
    assert facts["modules"] == expected
    trained = {name: weight for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * sum(expected.values())
    assert facts["parameters"] == sum(weight.numel() for weight in trained.values())
    assert not any("vision" in name or "mlp" in name or "lm_head" in name for name in trained)


def test_auto_is_what_the_default_was_for_a_llama() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    first, second = (
        add_lora(build("llama", {}), replace(AUTO, lora_targets=targets), seed=4) for targets in ("auto", names)
    )
    assert set(first.peft_config["default"].target_modules) == set(names)
    for (name, weight), (other, same) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(weight, same)


@pytest.mark.parametrize(("model_type", "settings"), [("llama", {}), ("gpt2", GPT2), ("phi3", {}), ("gpt_neox", {})])
def test_all_linear_is_what_peft_calls_so(model_type: str, settings: dict[str, Any]) -> None:
    model = build(model_type, settings)
    found = lora_targets(model, replace(AUTO, lora_targets="all-linear"))
    wrapped = get_peft_model(build(model_type, settings), LoraConfig(target_modules="all-linear"))
    assert sorted(found) == sorted(wrapped.base_model.targeted_module_names)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "fc1", "out_proj", "self_attn.o_proj"]])
def test_a_vision_tower_is_left_alone_whatever_is_asked(targets: Any) -> None:
    settings = replace(AUTO, lora_targets=targets)
    model = build("gemma3", {})
    found = lora_targets(model, settings)
    assert found
    assert all(name.startswith("model.language_model.layers.") for name in found)
    wrapped = add_lora(model, settings, seed=0)
    assert sorted(wrapped.base_model.targeted_module_names) == sorted(found)
    facts = lora_facts(wrapped, settings)
    assert facts["absent"] == ([] if targets == "all-linear" else ["fc1", "out_proj"])


def test_without_attention_there_is_one_line() -> None:
    mamba = build("mamba", {"state_size": 4})
    with pytest.raises(UserError, match=r"^warmup\.lora_targets=auto: the model has no attention to train; it has "):
        add_lora(mamba, WarmupSettings(), seed=0)
    with pytest.raises(UserError, match=r"^train\.lora_targets=out_proj: .*") as caught:
        add_lora(mamba, replace(AUTO, lora_targets=["out_proj"]), seed=0)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("gpt2", GPT2), ("phi3", {}), ("gpt_neox", {}), ("gemma3", {}), ("deepseek_v3", MLA)],
)
def test_record_gradients_are_autograds_whatever_the_layer(model_type: str, settings: dict[str, Any]) -> None:
    model = build(model_type, settings)
    wrapped = add_lora(model, AUTO, seed=0)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    inner = wrapped.get_base_model().eval()
    assert (model_type == "gpt2") == any(isinstance(module, Conv1D) for module in inner.modules())
    ids, labels = batch()
    found: dict[str, torch.Tensor] = {}
    record_gradients(inner, ids, labels, lambda name, gradients: found.update({name: gradients.clone()}))
    weights = {name: weight for name, weight in inner.named_parameters() if weight.requires_grad}
    assert set(found) == set(weights)
    for record in range(2):
        mean = own_losses(inner, ids, labels)[record] / int((labels[record, 1:] != IGNORED).sum())
        for name, gradient in zip(weights, torch.autograd.grad(mean, list(weights.values())), strict=True):
            torch.testing.assert_close(found[name][record], gradient, rtol=1e-4, atol=1e-6)


def test_a_layer_that_mixes_records_is_refused_by_name() -> None:
    model = build("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16})
    inner = add_lora(model, replace(AUTO, lora_targets="all-linear"), seed=0).get_base_model()
    ids, labels = batch()
    with pytest.raises(UserError, match=r"the gradients of model\.layers\.0\.mlp\S* cannot be told apart by record"):
        record_gradients(inner, ids, labels, lambda name, gradients: None)


def test_a_weight_without_a_gradient_has_moments_of_zeros(tmp_path: Path) -> None:
    wrapped = add_lora(build("llama", {}), AUTO, seed=0)
    inner: Any = wrapped.get_base_model()
    weights = {name: weight for name, weight in inner.named_parameters() if weight.requires_grad}
    idle = [name for name in weights if ".layers.1." in name]
    optimizer = AdamW(list(weights.values()), lr=1e-3)
    for _ in range(3):
        for name, weight in weights.items():
            weight.grad = None if name in idle else torch.ones_like(weight)
        optimizer.step()
    AdamMoments.of(optimizer, weights).save(tmp_path / "moments")
    moments = AdamMoments.load(tmp_path / "moments")
    assert moments.step == 3
    assert set(moments.first) == set(moments.second) == set(weights)
    assert all((not moments.first[name].any()) == (name in idle) for name in weights)
    ids, _ = batch()
    roles, lengths = torch.full((2, 10), 2, dtype=torch.uint8), torch.tensor([10, 10])
    read = GradientFeatures(64, 0, tmp_path / "moments")
    features = read(inner, {"input_ids": ids, "roles": roles, "lengths": lengths})
    assert torch.isfinite(features).all()
    assert features.any()


# ------------------------------------------------------------------------------------------- what is told


def test_a_list_that_fits_in_part_is_warned_of_and_noted(tmp_path: Path) -> None:
    settings = WarmupSettings(lora_rank=3, lora_targets=["qkv_proj", "q_proj"])
    facts = lora_facts(add_lora(build("phi3", {}), settings, seed=0), settings)
    assert facts["absent"] == ["q_proj"]
    ledger, store = Ledger(), Store(tmp_path)
    entry = store.get(StageKey("warmup", 1), lambda folder: {"lora": facts, "seconds": 1.0})
    source: Any = type("Source", (), {"name": "phi", "max_positions": None})()
    handle = ModelHandle(source, "float32", store, ledger, trainer={}, seed=0, max_length=8)
    handle.book_training("warmup", entry, settings)
    assert ledger.warnings == ["warmup.lora_targets=qkv_proj,q_proj: phi has no q_proj; trained: qkv_proj"]
    assert ledger.stages["warmup"].as_dict()["lora"]["modules"] == {"qkv_proj": 2}
