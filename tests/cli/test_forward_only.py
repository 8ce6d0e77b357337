"""Selection is forward-only: nothing asks for a gradient, and no pass records what one would need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cli.conftest import Inputs, Run


class GradientAsked(RuntimeError):
    """Somebody asked for a gradient."""


@pytest.fixture
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every way to a gradient raises; whether autograd was on, per forward of a model."""

    def refuse(*_: Any, **__: Any) -> None:
        raise GradientAsked

    for owner, name in (
        (torch.Tensor, "backward"), (torch.autograd, "backward"), (torch.autograd, "grad"),
        (torch.func, "grad"), (torch.func, "vjp"), (torch.func, "vmap"), (torch, "vmap"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    seen: list[bool] = []
    call = torch.nn.Embedding.forward

    def watched(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return call(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", watched)
    return seen


@pytest.mark.parametrize("method", ["trim", "rds", "perplexity", "ifd"])
def test_a_selection_is_forward_only(
    run: Run, inputs: Inputs, tmp_path: Path, no_gradients: list[bool], method: str
) -> None:
    outcome = run(
        *inputs.arguments, f"method={method}", "warmup=none", f"paths.store_dir={tmp_path / 'own'}", "logger=none"
    )
    assert outcome.code == 0, outcome.err
    assert len(no_gradients) >= 2
    assert not any(no_gradients)


@pytest.mark.parametrize("method", ["less", "tagcos"])
def test_gradient_methods_would_be_caught(
    run: Run, inputs: Inputs, tmp_path: Path, no_gradients: list[bool], method: str
) -> None:
    outcome = run(
        *inputs.arguments, f"method={method}", "method.num_checkpoints=1", "warmup=lora",
        f"paths.store_dir={tmp_path / 'own'}", "logger=none",
    )  # fmt: skip
    assert outcome.code != 0
    assert "GradientAsked" in outcome.err
