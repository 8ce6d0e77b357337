"""Going on from the keys and values of a shared prefix gives the states of whole records, or is not done at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, MambaConfig, MambaForCausalLM, PreTrainedModel

from tiny_models import ARCHITECTURES, WINDOW
from trim_lightning.models import prefix as prefixes
from trim_lightning.models.loss import last_hidden_states
from trim_lightning.models.prefix import can_resume, states_after

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


def test_a_model_without_keys_and_values_cannot() -> None:
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=360, state_size=4)
    model = MambaForCausalLM(config).eval()
    if can_resume(model):  # its states went on as well: then they must be right
        with torch.inference_mode():
            whole, resumed = last_hidden_states(model, records(20)), states_after(model, records(20), 20)
        torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-4)


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
