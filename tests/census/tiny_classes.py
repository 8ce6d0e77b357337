"""A tiny random model of every class that transformers calls causal: its default config with small numbers put in.

`SMALL` has the names of sizes that configs of many classes share, `SPECIAL` what single classes want besides. Nothing
is downloaded; a class of a newer transformers release gets `SMALL` and, where that does not build, an entry in
`SPECIAL`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTextToWaveform,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, MOST_WEIGHTS = 360, 5_000_000
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "sep_token_id": 1,
    "sliding_window": 8, "moe_intermediate_size": 16, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_head_dim": 8, "linear_num_heads": 4,
    "index_head_dim": 8, "index_topk": 4, "index_n_heads": 8,
    "encoder_layers": 2, "decoder_layers": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "ffn_dim": 48,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_dt_rank": 4, "mamba_chunk_size": 16,
    "mamba_d_ssm": 64, "mamba_n_groups": 1, "state_size": 8, "time_step_rank": 4, "chunk_size": 16, "block_size": 16,
    "query_pre_attn_scalar": 8, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "n_inner": 48, "rotary_dim": 4, "n_positions": 512, "max_seq_len": 512, "ffn_hidden_size": 48,
    "max_window_layers": 2,
}  # fmt: skip
TOWER: dict[str, Any] = {  # for images and sounds
    "num_hidden_layers": 2, "num_layers": 2, "depth": 2, "num_blocks": 2, "hidden_size": 16, "out_hidden_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "attention_heads": 2, "num_heads": 2, "head_dim": 8,
    "intermediate_size": 32, "mlp_dim": 32, "image_size": 28, "crop_size": 28, "patch_size": 14,
    "global_attn_indexes": [1], "window_size": 2, "output_channels": 16, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "d_model": 16, "encoder_layers": 2, "output_proj_dims": 32, "vision_output_dim": 32,
    "projector_input_dim": 32, "projector_output_dim": 32, "num_global_layers": 1, "intermediate_layers_indices": [1],
    "num_position_embeddings": 16, "base_channels": 32, "embed_dim": 4, "codebook_size": 16, "mm_embed_dim": 32,
}  # fmt: skip
MLA = {"num_key_value_heads": 4}  # as many key-value heads as heads
WINDOWED = ["sliding_attention", "full_attention"] * 2
PER_LAYER = {"layer_types": WINDOWED, "global_head_dim": 16, "num_global_key_value_heads": 2}
INKLING = {
    "unpadded_vocab_size": VOCABULARY,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
}
MUSICGEN: dict[str, Any] = {
    "text_encoder": {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "audio_encoder": {
        "num_filters": 4,
        "hidden_size": 16,
        "codebook_size": 16,
        "codebook_dim": 16,
        "upsampling_ratios": [2, 2],
        "num_lstm_layers": 1,
    },
}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "sarvam_mla",
            "youtu",
        ],
        MLA,
    ),
    "longcat_flash": {**MLA, "zero_expert_num": 2, "num_layers": 2, "expert_ffn_hidden_size": 16},
    "cohere_compass_text": {
        "layer_types": WINDOWED,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in set(WINDOWED)},
    },
    "cpmant": {"dim_head": 8, "dim_ff": 48, "position_bias_num_buckets": 32},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "layer_types": WINDOWED,
        **{
            f"swa_{name}": SMALL[name]
            for name in (
                "num_attention_heads",
                "q_lora_rank",
                "kv_lora_rank",
                "head_dim",
                "qk_nope_head_dim",
                "v_head_dim",
            )
        },
        "swa_num_key_value_heads": 4,
        "swa_qk_rope_head_dim": 8,
        "swa_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 16, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 16, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "gemma3n_text": {
        "layer_types": WINDOWED,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": PER_LAYER,
    "gemma4_unified_text": PER_LAYER,
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "inkling2_loop_text": INKLING,
    "inkling2_text": INKLING,
    "inkling_text": INKLING,
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "bailing_hybrid": {**MLA, "layer_group_size": 2},
    "kimi_linear": {**MLA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "deepseek_v4": {"o_lora_rank": 16},
    "musicgen": MUSICGEN,
    "musicgen_melody": MUSICGEN,
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "prophetnet": {
        "num_encoder_layers": 2,
        "num_decoder_layers": 4,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 16],
        "feed_forward_size": 48,
        "attention_head_size": 8,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 10,
        "shape_vocab_size": 10,
        "shape_embed_dim": 8,
        "pronunciation_embed_dim": 8,
    },
    "xlnet": {"d_inner": 48, "d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_dt_rank": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_dt_rank": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


# their checkpoints hold more than the text model, which is what transformers builds from their configs
AS_PUBLISHED: dict[str, Any] = {
    **dict.fromkeys(
        ("dots3_note", "emu3", "llama4", "mistral3", "mllama", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen4_exp"),
        AutoModelForImageTextToText,
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), AutoModelForTextToWaveform),
}


def small(kind: type[PreTrainedConfig], sizes: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """What to give a config class: those of the sizes that it knows, and its parts' likewise."""
    known = {name for name in sizes if hasattr(kind, name) or name in kind.attribute_map}
    given = {
        name: value
        for name, value in sizes.items()
        if name in known and name not in kind.sub_configs and not isinstance(getattr(kind, name, None), property)
    }
    for name, part in kind.sub_configs.items():
        default = getattr(kind, "sub_configs_defaults", {}).get(name)
        its_type = getattr(default, "model_type", None) or getattr(part, "model_type", "")
        its_kind = CONFIG_MAPPING[its_type] if its_type in CONFIG_MAPPING else part  # noqa: SIM401  its get is not lazy
        text = not any(word in name for word in ("vision", "audio", "vq"))
        sizes_here, special_here = (SMALL, SPECIAL.get(its_type, {})) if text else ({**SMALL, **TOWER}, {})
        given[name] = {**small(its_kind, sizes_here, special_here), **special.get(name, {})}
        if its_type:
            given[name]["model_type"] = its_type
    return {**given, **{name: value for name, value in special.items() if name not in kind.sub_configs}}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The config of a tiny model of this type."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**small(kind, SMALL, SPECIAL.get(model_type, {})))


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model with matrices far from zero, biases and the scales of norms moved off their neutral values.

    Raises:
        ValueError: if it would not be tiny.
    """
    config = tiny_config(model_type)
    published: Any = AS_PUBLISHED.get(model_type, AutoModelForCausalLM)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in published.from_config(config).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"{size:,} weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = published.from_config(config, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=draw)
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model
