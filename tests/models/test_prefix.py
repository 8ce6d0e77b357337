"""Going on from the keys and values of a shared prefix gives the states of whole records, or is not done at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

from tiny_models import ARCHITECTURES, WINDOW
from trim_lightning.models import prefix as prefixes
from trim_lightning.models.depth import first_layers
from trim_lightning.models.loss import last_hidden_states
from trim_lightning.models.prefix import can_resume, states_after

SMALL = {"vocab_size": 360, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
KEEPS = {
    "gpt2": GPT2Config(vocab_size=360, n_embd=32, n_layer=2, n_head=4),
    "bloom": BloomConfig(vocab_size=360, hidden_size=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(**SMALL, alibi=True, new_decoder_architecture=False),
    "mixtral": MixtralConfig(**WIDE, num_local_experts=4, sliding_window=None),
    "deepseek_v3": DeepseekV3Config(
        **{**WIDE, "num_key_value_heads": 4}, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    ),
}  # fmt: skip
KEEPS_MORE = {
    "mamba": MambaConfig(vocab_size=360, hidden_size=32, num_hidden_layers=2, state_size=4),
    "recurrent_gemma": RecurrentGemmaConfig(**WIDE, lru_width=32, attention_window_size=16),
    "qwen3_next": Qwen3NextConfig(**WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip
Load = Callable[[str], PreTrainedModel]


def records(prefix: int, width: int = 30) -> torch.Tensor:
    """Four sequences of these tokens, the first ``prefix`` equal in all."""
    ids = torch.randint(3, 300, (4, width), generator=torch.Generator().manual_seed(0))
    ids[:, :prefix] = ids[0, :prefix]
    return ids


@pytest.mark.parametrize("prefix", [1, WINDOW - 1, WINDOW + 9, 29])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_those_of_whole_records(architecture: str, prefix: int, tiny_model: Load) -> None:
    model, ids = tiny_model(architecture), records(prefix)
    assert can_resume(model)
    with torch.inference_mode():
        whole, resumed = last_hidden_states(model, ids), states_after(model, ids, prefix)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=2e-5)


def test_the_prefix_runs_once(tiny_model: Load) -> None:
    model, seen = tiny_model("llama"), []
    layer = model.get_submodule("model.layers.0.mlp")
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    with torch.inference_mode():
        states_after(model, records(20), 20)
    assert seen == [(1, 20), (4, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*KEEPS, *KEEPS_MORE])
def test_what_a_class_keeps_decides(name: str, dtype: torch.dtype) -> None:
    """Position biases, latent and rotary attention, windows and experts go on; recurrent layers do not."""
    torch.manual_seed(0)
    config = {**KEEPS, **KEEPS_MORE}[name]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    assert can_resume(model) == (name in KEEPS)
    if name in KEEPS and dtype == torch.float32:
        with torch.inference_mode():
            whole, resumed = last_hidden_states(model, records(20)), states_after(model, records(20), 20)
        torch.testing.assert_close(resumed, whole, rtol=0, atol=5e-4)


def test_a_view_of_the_first_layers_can(tiny_model: Load) -> None:
    model = first_layers(tiny_model("llama"), 1)
    assert can_resume(model)
    with torch.inference_mode():
        whole, resumed = last_hidden_states(model, records(20)), states_after(model, records(20), 20)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=2e-5)


def test_a_window_in_the_config_that_the_class_does_not_heed_cuts_no_keys(tiny_model: Load) -> None:
    model = tiny_model("llama")
    model.config.sliding_window = 8
    with torch.inference_mode():
        whole, resumed = last_hidden_states(model, records(20)), states_after(model, records(20), 20)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=2e-5)


def test_weights_that_are_brought_for_each_call_are_brought_once(tiny_model: Load) -> None:
    model = tiny_model("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    assert not can_resume(model)


def test_a_model_whose_states_do_not_go_on_is_found_out(tiny_model: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def forgets(base: PreTrainedModel, ids: torch.Tensor, prefix: int) -> torch.Tensor:
        """As a class that takes the cache and does not look into it."""
        return torch.cat([last_hidden_states(base, part) for part in (ids[:, :prefix], ids[:, prefix:])], dim=1)

    monkeypatch.setattr(prefixes, "states_after", forgets)
    assert not can_resume(model)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "linear"])
def test_rotary_embeddings_that_depend_on_the_whole_length_are_left_alone(kind: str, tiny_model: Load) -> None:
    model = tiny_model("llama")
    assert isinstance(model.config, LlamaConfig)
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    assert can_resume(model) == (kind == "linear")
