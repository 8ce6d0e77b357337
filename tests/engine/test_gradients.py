"""Gradients of single records from one backward pass, against one backward pass for each record."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap
from transformers import PreTrainedModel

from tiny_models import ARCHITECTURES
from trim_lightning.engine.batches import ShardBatches, plan_shards
from trim_lightning.engine.gradients import block_of, lora_matrices, record_gradients
from trim_lightning.engine.labels import labels_of, trained_labels
from trim_lightning.errors import UserError
from trim_lightning.models.lora import add_lora
from trim_lightning.models.loss import IGNORED, summed_loss
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tokens.tokenized import TokenizedRecords

Load = Callable[[str], PreTrainedModel]
LENGTHS = (21, 9, 14, 6, 11)


def with_lora(model: PreTrainedModel) -> PreTrainedModel:
    """The model with LoRA inside that does something, dropout off and all weights frozen."""
    wrapped = add_lora(model, TuningSettings(lora_rank=3, lora_dropout=0.1), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    inner = wrapped.get_base_model().eval()
    inner.requires_grad_(False)
    return inner


def some_records() -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids and labels; the fourth record has nothing to learn from."""
    generator = torch.Generator().manual_seed(0)
    input_ids, labels = torch.zeros(5, 21, dtype=torch.int64), torch.full((5, 21), IGNORED)
    for line, length in enumerate(LENGTHS):
        input_ids[line, :length] = torch.randint(3, 300, (length,), generator=generator)
        if line != 3:
            labels[line, length // 2 : length] = input_ids[line, length // 2 : length]
    return input_ids, labels


def all_at_once(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def collect(name: str, gradients: torch.Tensor) -> None:
        assert name not in found, "twice"
        found[name] = gradients.clone()

    record_gradients(model, input_ids, labels, collect)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_record_has_the_gradient_that_it_has_alone(architecture: str, tiny_model: Load) -> None:
    model = with_lora(tiny_model(architecture))
    input_ids, labels = some_records()
    found = all_at_once(model, input_ids, labels)
    weights = {name: module.weight for name, module in lora_matrices(model).items()}
    assert set(found) == set(weights)
    assert not any(weight.requires_grad for weight in weights.values())
    for line, length in enumerate(LENGTHS):
        if line == 3:
            assert all(not gradients[line].any() for gradients in found.values())
            continue
        for weight in weights.values():
            weight.requires_grad_(True)
        one, wanted = input_ids[line : line + 1, :length], labels[line : line + 1, :length]
        loss = summed_loss(model, one, wanted) / int((wanted[:, 1:] != IGNORED).sum())
        expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        for weight in weights.values():
            weight.requires_grad_(False)
        for name, gradient in expected.items():
            small = 1e-4 * float(gradient.abs().max())  # float32, added up in another order
            torch.testing.assert_close(found[name][line], gradient, rtol=1e-3, atol=small)
        one_line, alone = (torch.cat([part.flatten() for part in parts]) for parts in
                           ([found[name][line] for name in weights], expected.values()))  # fmt: skip
        assert float(torch.cosine_similarity(one_line, alone, dim=0)) > 1 - 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_blocks_alone_have_the_same_gradients_and_nothing_runs_back_beneath_them(
    architecture: str, tiny_model: Load
) -> None:
    model = with_lora(tiny_model(architecture))
    input_ids, labels = some_records()
    whole, found = all_at_once(model, input_ids, labels), {}
    needed = []
    for name, module in lora_matrices(model).items():
        module.register_forward_hook(lambda _, given, output, name=name: needed.append((name, output.requires_grad)))
    record_gradients(model, input_ids, labels, lambda name, gradients: found.update({name: gradients.clone()}), last=1)
    blocks = list(dict.fromkeys(map(block_of, lora_matrices(model))))
    assert len(blocks) > 1
    assert set(found) == {name for name in whole if block_of(name) == blocks[-1]} == set(lora_matrices(model, 1))
    assert {name for name, wanted in needed if wanted} == set(found)
    for name, gradients in found.items():
        torch.testing.assert_close(gradients, whole[name], rtol=1e-5, atol=1e-8)
    with pytest.raises(UserError, match=rf"LoRA is in {len(blocks)} blocks"):
        lora_matrices(model, len(blocks) + 1)


def test_torchs_own_transforms_give_the_same(tiny_model: Load) -> None:
    model = with_lora(tiny_model("llama"))
    input_ids, labels = some_records()
    found = all_at_once(model, input_ids, labels)
    weights = {name: module.weight.detach() for name, module in lora_matrices(model).items()}
    model.set_attn_implementation("eager")  # vmap knows it

    def loss(weights: dict[str, torch.Tensor], ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, weights, kwargs={"input_ids": ids[None], "use_cache": False}).logits[0, :-1]
        summed = torch.nn.functional.cross_entropy(logits, wanted[1:], ignore_index=IGNORED, reduction="sum")
        return summed / (wanted[1:] != IGNORED).sum().clamp(min=1)

    expected = vmap(grad(loss), in_dims=(None, 0, 0))(weights, input_ids, labels)
    for name, gradients in expected.items():
        small = 1e-4 * float(gradients.abs().max())  # as above
        torch.testing.assert_close(found[name], gradients, rtol=1e-3, atol=small)


def test_nothing_stays_on_the_model(tiny_model: Load) -> None:
    model = with_lora(tiny_model("llama"))
    all_at_once(model, *some_records())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert sum(hooks) == 0
    with torch.no_grad():
        assert not model(input_ids=some_records()[0]).logits.requires_grad


def test_labels_are_those_of_training(tokenized: Callable[..., TokenizedRecords]) -> None:
    roles = [[0, 1, 1, 2, 2, 0, 1, 2, 0], [1, 2, 2], [0, 1, 0], [2, 0, 0, 1]]  # the second is cut in its response
    records = tokenized([(list(range(5, 5 + len(part))), part) for part in roles])
    (batch,) = (ShardBatches(records, plan_shards(records.lengths, 1000), "all")[place] for place in (0,))
    found = trained_labels(batch["input_ids"], batch["roles"], batch["lengths"])
    for line, row in enumerate(batch["rows"].tolist()):
        expected = labels_of(records[row])
        np.testing.assert_array_equal(found[line, : len(expected)].numpy(), expected)
        assert (found[line, len(expected) :] == IGNORED).all()
