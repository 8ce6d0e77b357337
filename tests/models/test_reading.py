"""Attention is read as the model computes it: by a hook, by its own eager function, by weights it gives, or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tiny_models import build_tiny_tokenizer
from trim_lightning.engine.modules import TargetPass
from trim_lightning.errors import UserError
from trim_lightning.models.attention import NAME, OWN
from trim_lightning.models.load import load_model
from trim_lightning.models.loss import base_of
from trim_lightning.models.reading import HOOK, NONE, WEIGHTS, read, reading_of
from trim_lightning.models.source import find_model
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.store import Store
from trim_lightning.trim.saliency import attention_statistics, weight_statistics

SHARED: dict[str, Any] = {
    "vocab_size": 360, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
OLD: dict[str, Any] = {name: SHARED[name] for name in ("vocab_size", "hidden_size", "num_attention_heads")}
MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False, "num_experts": 4, "num_experts_per_tok": 2}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
SPARSE = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "index_topk": 6, "index_n_heads": 8, "index_head_dim": 8,
}  # fmt: skip
# model type, its config, which attention runs, how it is read, layers
CASES: list[tuple[str, dict[str, Any], str, str, tuple[int, ...]]] = [
    ("llama", SHARED, NAME, HOOK, (0, 1, 2, 3)),
    ("gemma2", {**SHARED, "sliding_window": 8, "attn_logit_softcapping": 3.0}, OWN, HOOK, (0, 1, 2, 3)),
    ("gpt_oss", {**SHARED, "num_local_experts": 4, "sliding_window": 8}, OWN, HOOK, (0, 1, 2, 3)),
    ("qwen3_5_text", {**SHARED, **DELTA}, NAME, HOOK, (3,)),
    ("jamba", {**SHARED, **MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1}, NAME, HOOK, (1, 3)),
    ("bloom", {**OLD, "n_layer": 4}, "eager", WEIGHTS, (0, 1, 2, 3)),
    ("falcon", {**OLD, "num_hidden_layers": 4}, "sdpa", WEIGHTS, (0, 1, 2, 3)),
    ("deepseek_v32", {**SHARED, **SPARSE}, "sdpa", WEIGHTS, (0, 1, 2, 3)),
]
Load = Callable[[str, dict[str, Any]], tuple[Path, PreTrainedModel]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Saves a tiny random model of a class and loads it as the product does."""

    def make(model_type: str, settings: dict[str, Any]) -> tuple[Path, PreTrainedModel]:
        folder, draw = tmp_path / "model", torch.Generator().manual_seed(5)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = 0.2 * torch.randn(parameter.shape, generator=draw)
                parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
        model.save_pretrained(folder)
        build_tiny_tokenizer().save_pretrained(folder)
        return folder, load_model(find_model(ModelSettings(path=str(folder)), Store(tmp_path / "store")), torch.float32)

    return make


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences ``[2, 20]`` of 20 and 13 tokens."""
    ids = torch.randint(3, 360, (2, 20), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([20, 13])


def eager_signals(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and signals of one sequence, from the weights that transformers gives in float64."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float64}
    model = AutoModelForCausalLM.from_pretrained(folder, **eager).eval()
    with torch.no_grad():
        output = base_of(model)(input_ids=ids[None], output_attentions=True, use_cache=False)
    rows, columns = [], []
    for weights in (each[0].double() for each in output.attentions if each is not None):
        seen = weights > 0
        weights = weights / weights.sum(-1, keepdim=True)
        size = seen.sum(-1)
        sure = 1 + torch.special.xlogy(weights, weights).sum(-1) / size.clamp(min=2).log()
        rows.append(torch.where(size > 1, sure, 0).mean(0))
        columns.append((weights.sum(1) / seen.sum(1).clamp(min=1)).mean(0))
    return output.last_hidden_state[0], torch.stack(rows), torch.stack(columns)


@pytest.mark.parametrize(("model_type", "settings", "runs", "way", "layers"), CASES)
def test_signals_are_those_of_the_models_own_attention(
    model_type: str, settings: dict[str, Any], runs: str, way: str, layers: tuple[int, ...], load: Load
) -> None:
    folder, model = load(model_type, settings)
    assert model.config._attn_implementation == runs
    found = reading_of(model)
    assert (found.way, found.layers, found.total) == (way, layers, 4)
    ids, lengths = batch()
    with torch.inference_mode():
        hidden, rows, columns = read(model, ids, lengths)
    assert rows.shape == columns.shape == (len(layers), 2, 20)
    for line, length in enumerate(lengths.tolist()):
        own = eager_signals(folder, ids[line, :length])
        for ours, expected in zip((hidden[line], rows[:, line], columns[:, line]), own, strict=True):
            ours = ours[:length] if ours is hidden[line] or ours.shape[0] == 20 else ours[:, :length]
            torch.testing.assert_close(
                ours.double(), expected, rtol=0, atol=2e-4 * max(1.0, float(expected.abs().max()))
            )
    assert model.config._attn_implementation == runs


def test_a_class_without_attention_gives_no_signals(load: Load) -> None:
    _, model = load("mamba", {"vocab_size": 360, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8})
    found = reading_of(model)
    assert (found.way, found.layers, found.why) == (NONE, (), "MambaForCausalLM has no softmax attention")
    ids, lengths = batch()
    with torch.inference_mode():
        (first, _) = TargetPass(model).on_batch(
            {"input_ids": ids, "lengths": lengths, "rows": torch.arange(2), "roles": torch.zeros(2, 20)}
        )
    assert first["row_signal"].shape == first["column_signal"].shape == (0, 20)
    assert torch.isfinite(first["hidden"]).all()


def test_weights_that_belong_to_another_computation_are_not_read(load: Load) -> None:
    """transformers' eager Falcon adds its ALiBi twice, its SDPA once: what the former gives out is not the latter's."""
    _, model = load("falcon", {**OLD, "num_hidden_layers": 4, "alibi": True})
    found = reading_of(model)
    assert (found.way, found.layers) == (NONE, ())
    assert found.why == "FalconForCausalLM has an attention of its own that cannot be read from outside"


def test_a_class_that_wants_more_than_a_text_is_refused(load: Load) -> None:
    text = {**SHARED, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16}
    with pytest.raises(UserError, match=r"Gemma4AssistantForCausalLM cannot run on a text alone") as caught:
        load("gemma4_assistant", {"text_config": {"model_type": "gemma4_text", **text}})
    assert "\n" not in str(caught.value)


def test_weights_give_what_queries_and_keys_give() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, 9, 8, generator=draw) for _ in range(2))
    lengths, hidden = torch.tensor([9, 5]), ~torch.ones(9, 9, dtype=torch.bool).tril()
    weights = (query @ key.transpose(-1, -2) * 0.5).masked_fill(hidden, float("-inf")).softmax(-1)
    expected = attention_statistics(query, key, 0.5, lengths)
    for given in (weights, 0.3 * weights):  # the rest goes to a sink
        for ours, its in zip(weight_statistics(given, lengths), expected, strict=True):
            torch.testing.assert_close(ours, its)
    nothing = weight_statistics(torch.zeros(1, 2, 3, 3), torch.tensor([3]))
    assert all(torch.equal(signal, torch.zeros(1, 3)) for signal in nothing)
