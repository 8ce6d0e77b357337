"""The first layers of a model: the same hidden states as in the whole, the same weights, and the whole stays whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from tiny_models import ARCHITECTURES
from trim_lightning.errors import UserError
from trim_lightning.models.depth import cut_layers, first_layers, path_to_layers
from trim_lightning.models.loss import last_hidden_states
from trim_lightning.models.reading import read, reading_of

IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_view_computes_what_the_model_computes_up_to_there(
    tiny_model: Callable[[str], PreTrainedModel], architecture: str
) -> None:
    model, cut = tiny_model(architecture), tiny_model(architecture)
    whole, before = last_hidden_states(model, IDS), reading_of(model)
    view = first_layers(model, 2)
    cut_layers(cut, 2)
    states = last_hidden_states(view, IDS)
    assert not torch.allclose(states, whole)
    assert torch.equal(states, last_hidden_states(cut, IDS))
    assert torch.equal(last_hidden_states(model, IDS), whole), "the model itself stays whole"
    assert reading_of(model) == before
    second, seen = dict(model.named_modules())[path_to_layers(model) + ".1"], []
    handle = second.register_forward_hook(lambda module, given, result: seen.append(torch.as_tensor(result[0])))
    last_hidden_states(model, IDS)
    last_hidden_states(view, IDS)
    handle.remove()
    assert torch.equal(*seen), "the layer is one and the same"
    assert {weight.data_ptr() for weight in view.parameters()} <= {weight.data_ptr() for weight in model.parameters()}


def test_the_attention_of_a_view_is_that_of_its_layers(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    _, rows, columns = read(model, IDS, torch.tensor([IDS.shape[1]]))
    view = first_layers(model, 3)
    assert (reading_of(view).layers, reading_of(view).total) == ((0, 1, 2), 3)
    _, cut_rows, cut_columns = read(view, IDS, torch.tensor([IDS.shape[1]]))
    torch.testing.assert_close(cut_rows, rows[:3])
    torch.testing.assert_close(cut_columns, columns[:3])


def test_a_model_that_something_else_runs_cannot_be_cut(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    inner = model.base_model
    inner.forward = inner.forward  # as accelerate does
    with pytest.raises(UserError, match=r"scoring\.cascade\.layers: LlamaModel is run by something around it"):
        first_layers(model, 2)
