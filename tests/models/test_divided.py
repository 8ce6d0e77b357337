"""Weights divided among processes: each reads its own parts, and the model computes what the whole one does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from trim_lightning.engine.spawned import run_spawned
from trim_lightning.models.divided import WeightFiles, is_divided, mesh_of, own
from trim_lightning.models.load import ModelRecipe
from trim_lightning.models.lora import add_lora, save_adapter
from trim_lightning.models.source import ModelSource, find_model
from trim_lightning.settings.schema import ModelSettings, TuningSettings
from trim_lightning.store import Store
from trim_lightning.store.processes import Processes

PLAIN = ("llama", "mistral", "qwen2", "opt", "opt_projected", "gemma3")
INPUT = torch.arange(3, 43).view(2, 20)


def look(recipes: dict[str, ModelRecipe], processes: Processes, logger: Any) -> dict[str, list[dict[str, Any]]]:
    """What each process read and holds of the models, and their logits."""
    read, found = WeightFiles.read, {}
    for name, recipe in recipes.items():
        sizes: list[tuple[str, int]] = []

        def noting(self: WeightFiles, weight: str, like: torch.Tensor, *, sizes: Any = sizes) -> torch.Tensor:
            value = read(self, weight, like)
            sizes.append((weight, value.numel()))
            return value

        WeightFiles.read = noting  # type: ignore[method-assign]
        model = recipe.load(mesh_of(torch.device("cpu"), processes.size))
        with torch.no_grad():
            logits = model(input_ids=INPUT).logits
        holds = sum(own(weight).numel() for weight in model.parameters())
        part = {"read": sizes, "holds": holds, "logits": logits.tolist(), "divided": is_divided(model)}
        parts: list[Any] = [None] * processes.size
        distributed.all_gather_object(parts, part)
        found[name] = parts
    return found


def find(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return find_model(ModelSettings(path=str(folder)), Store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def recipes(
    tiny_source: Callable[[str], ModelSource], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ModelRecipe]:
    """Plain ones, one with an adapter, one with other names in its files, one whose experts are put together."""
    found = {name: ModelRecipe(tiny_source(name), torch.float32) for name in PLAIN}
    root = tmp_path_factory.mktemp("divided")
    wrapped = add_lora(found["llama"].load(), TuningSettings(lora_rank=4), seed=0)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    save_adapter(wrapped, root / "adapter")
    found["adapter"] = ModelRecipe(found["llama"].source, torch.float32, root / "adapter")

    shutil.copytree(found["gemma3"].source.directory, root / "renamed")
    weights = load_file(root / "renamed/model.safetensors")
    save_file(
        {name.removeprefix("model."): weight for name, weight in weights.items()},
        root / "renamed/model.safetensors",
        {"format": "pt"},
    )
    found["renamed"] = ModelRecipe(find(root / "renamed", tmp_path_factory), torch.float32)
    shutil.copytree(found["llama"].source.directory, root / "experts")
    (root / "experts/model.safetensors").unlink()
    config = MixtralConfig(
        vocab_size=found["llama"].load().config.vocab_size, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(root / "experts")
    found["experts"] = ModelRecipe(find(root / "experts", tmp_path_factory), torch.float32)
    return found


@pytest.fixture(scope="module")
def parts(recipes: dict[str, ModelRecipe]) -> dict[str, list[dict[str, Any]]]:
    return run_spawned(partial(look, recipes), 2)


def kept_whole(model: PreTrainedModel) -> int:
    head: Any = model.get_output_embeddings()
    return int(head.weight.numel())


@pytest.mark.parametrize("name", [*PLAIN, "adapter", "renamed", "experts"])
def test_the_model_computes_what_the_whole_one_does(
    name: str, recipes: dict[str, ModelRecipe], parts: dict[str, list[dict[str, Any]]]
) -> None:
    with torch.no_grad():
        expected = recipes[name].load()(input_ids=INPUT).logits
    for part in parts[name]:
        assert part["divided"]
        torch.testing.assert_close(torch.tensor(part["logits"]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*PLAIN, "adapter", "renamed"])
def test_no_process_ever_holds_the_whole(
    name: str, recipes: dict[str, ModelRecipe], parts: dict[str, list[dict[str, Any]]]
) -> None:
    model = recipes[name].load() if name != "adapter" else recipes["llama"].load()
    sizes = {weight: value.numel() for weight, value in model.named_parameters()}
    whole, total, rows = kept_whole(model), sum(sizes.values()), max(map(len, model.parameters()))
    embeddings = {name for name, value in model.named_parameters() if value.numel() == whole}
    adapter = 4 * (32 * 8) * 4 if name == "adapter" else 0  # layers and projections of rank 4
    for part in parts[name]:
        read = dict(part["read"])
        assert read.keys() >= sizes.keys()
        for weight, size in read.items():
            if weight in sizes and weight not in embeddings:
                assert size <= -(-sizes[weight] // 2) + sizes[weight] // rows + 32, weight
        assert part["holds"] <= (total - whole) / 2 + whole + 32 * len(sizes) + adapter
    if name != "adapter":
        assert sum(part["holds"] for part in parts[name]) == total + whole, "each row is in one process"
