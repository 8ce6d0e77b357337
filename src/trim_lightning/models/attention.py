"""The attention hook: an attention function that computes as SDPA does and lets saliency look on.

It is registered with transformers' `AttentionInterface` under `NAME`, so it serves every architecture that
sends its attention through that interface, grouped-query and sliding-window ones included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trim_lightning.errors import UserError
from trim_lightning.trim.saliency import attention_statistics

NAME = "trim_sdpa"
UNSUPPORTED = {"softcap": "soft-capping", "s_aux": "sinks", "position_bias": "a position bias"}
_recorder: ContextVar[SaliencyRecorder | None] = ContextVar("trim_recorder", default=None)


class SaliencyRecorder:
    """Collects each layer's row and column signal during one forward pass.

    Args:
        lengths: ``[batch]`` real tokens of each sequence; padding is on the right.
        layers: Number of layers of the model; every one must report exactly once.
    """

    def __init__(self, lengths: Tensor, layers: int) -> None:
        self.lengths = lengths
        self.layers = layers
        self._signals: dict[int, tuple[Tensor, Tensor]] = {}

    def record(self, layer: int, row: Tensor, column: Tensor) -> None:
        """Keep the ``[batch, seq]`` signals of one layer.

        Raises:
            UserError: if the layer has reported before: it computes more than one attention.
        """
        if layer in self._signals:
            raise refusal("more than one attention in a layer")
        # layers may be on different devices
        self._signals[layer] = (row.to(self.lengths.device), column.to(self.lengths.device))

    def signals(self) -> tuple[Tensor, Tensor]:
        """Row and column signals, each ``[layers, batch, seq]`` float32.

        Raises:
            UserError: if a layer did not pass through the hook.
        """
        if sorted(self._signals) != list(range(self.layers)):
            raise UserError(
                f"model.path: only {len(self._signals)} of the model's {self.layers} layers send their attention "
                "through transformers' AttentionInterface, so saliency cannot be read; use a model with plain "
                "softmax attention in every layer"
            )
        ordered = [self._signals[layer] for layer in range(self.layers)]
        return torch.stack([row for row, _ in ordered]), torch.stack([column for _, column in ordered])


def refusal(what: str) -> UserError:
    """The error for attention that is not one causal softmax over queries and keys in each layer."""
    return UserError(
        f"model.path: the model uses {what}, which saliency does not support; use a model with plain softmax "
        "attention (LLaMA, Mistral, Qwen, OPT, Gemma 3 and the like)"
    )


@contextmanager
def recording(recorder: SaliencyRecorder) -> Iterator[SaliencyRecorder]:
    """Let ``recorder`` see every attention computed by the hook inside the ``with`` block."""
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def hooked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA for the output; when a recorder is active, attention statistics as well.

    Args:
        module: The attention module; its ``layer_idx`` says which layer this is.
        query: ``[batch, heads, seq, head_dim]``.
        key: ``[batch, kv_heads, seq, head_dim]``, before head repetition.
        value: Shape of ``key``.
        attention_mask: ``[batch or 1, 1, seq, seq]`` bool, or None for causal.
        scaling: Factor of the dot products; ``head_dim ** -0.5`` if None.
        **kwargs: What transformers passes on to SDPA.

    Raises:
        UserError: for attention that is not a plain causal softmax (soft-capping, sinks, position bias).
    """
    for argument, name in UNSUPPORTED.items():
        if kwargs.get(argument) is not None:
            raise refusal(f"{name} ({argument}) in its attention")
    recorder = _recorder.get()
    layer = getattr(module, "layer_idx", None)
    if recorder is not None and layer is not None:
        if not getattr(module, "is_causal", True):
            raise refusal("attention that is not causal")
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        visible = None if attention_mask is None else visible_keys(attention_mask)
        lengths = recorder.lengths.to(query.device)
        recorder.record(layer, *attention_statistics(query, key, factor, lengths, visible))
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output, None


def visible_keys(mask: Tensor) -> Tensor:
    """Which keys a query may see, ``[batch or 1, 1, seq, seq]`` bool, from a bool or an additive mask.

    Raises:
        UserError: if the mask adds a bias to visible scores, or differs between heads.
    """
    if mask.shape[1] != 1:
        raise refusal("a mask of its own for each head")
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not (hidden | (mask == 0)).all():
        raise refusal("a bias in its attention mask")
    return ~hidden


def register() -> str:
    """Register the hook with transformers and return its name; calling it again does no harm."""
    AttentionInterface.register(NAME, hooked_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
