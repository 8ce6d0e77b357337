"""``model.dtype``: what auto means on which hardware."""

from __future__ import annotations

import sys

import pytest
import torch

from trim_lightning.models.precision import asks_torch, has_cuda, multiplies_bfloat16, resolve_dtype, resolved_name


def hardware(
    monkeypatch: pytest.MonkeyPatch,
    *,
    cuda: int | None = None,
    mps: bool = False,
    avx512_bf16: bool = False,
    amx: bool = False,
) -> None:
    """Pretend to be a machine; ``cuda`` is the major compute capability of its GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (cuda, 0))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx": True}, torch.bfloat16),
        ({"cuda": 7, "avx512_bf16": True}, torch.float32),  # what counts is where the model will run
        ({"cuda": 8}, torch.bfloat16),
        ({"cuda": 9}, torch.bfloat16),
        ({"mps": True, "amx": True}, torch.float32),
    ],
)
def test_auto_follows_the_hardware(
    machine: dict[str, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware(monkeypatch, **machine)
    assert resolve_dtype("auto") == expected
    assert multiplies_bfloat16() == (expected == torch.bfloat16)


def test_without_torch_the_same_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a format is part of the keys of results, so both ways must agree."""
    with_torch = resolved_name("auto"), has_cuda()
    monkeypatch.delitem(sys.modules, "torch")
    if asks_torch():
        pytest.skip("this machine may have a GPU: torch must say")
    assert (resolved_name("auto"), has_cuda()) == with_torch


@pytest.mark.parametrize("machine", [{}, {"amx": True}, {"cuda": 9}])
def test_a_named_format_is_taken_at_its_word(machine: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    hardware(monkeypatch, **machine)
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("bfloat16") == torch.bfloat16


def test_a_torch_without_the_checks_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware(monkeypatch)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert resolve_dtype("auto") == torch.float32
