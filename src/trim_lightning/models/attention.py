"""The attention hooks: attention functions that compute what the model computes and let saliency look on.

They are registered with transformers' `AttentionInterface`, so they serve every architecture that sends its attention
through that interface. `NAME` is for plain softmax attention, grouped-query and sliding-window ones included: it runs
SDPA, and a recorder sees queries and keys. `OWN` is for all else (sinks, soft caps, biases): it runs the eager function
of the model's own file, and a recorder sees the weights that come of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from trim_lightning.errors import UserError
from trim_lightning.trim.saliency import attention_statistics, weight_statistics

NAME, OWN = "trim_sdpa", "trim_own"
UNSUPPORTED = {"softcap": "soft-capping", "s_aux": "sinks", "position_bias": "a position bias"}
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class NotPlainError(UserError):
    """Attention that is not one causal softmax over queries and keys, so that `NAME` does not do."""


class Watcher(Protocol):
    """What sees every attention that a hook computes, see `watching`."""

    def plain(self, module: nn.Module, query: Tensor, key: Tensor, factor: float, mask: Tensor | None) -> None:
        """Queries and keys of attention computed by SDPA; ``factor`` scales their dot products."""

    def own(self, module: nn.Module, weights: Callable[[], Tensor], mask: Tensor | None) -> None:
        """The model's own weights ``[batch, heads, seq, seq]`` in float32, computed when they are asked for."""

    def compare(self, module: nn.Module, ours: Callable[[], Tensor], own: Callable[[], Tensor]) -> None:
        """What SDPA and the model's own function give for the same attention, each computed when asked for."""


_watcher: ContextVar[Watcher | None] = ContextVar("trim_watcher", default=None)


class SaliencyRecorder:
    """Collects each layer's row and column signal during one forward pass.

    Args:
        lengths: ``[batch]`` real tokens of each sequence; padding is on the right.
        layers: The layers that have softmax attention, or the number of layers if all have; every one must report
            exactly once.
    """

    def __init__(self, lengths: Tensor, layers: int | Sequence[int]) -> None:
        self.lengths = lengths
        self.layers = list(range(layers)) if isinstance(layers, int) else list(layers)
        self._signals: dict[int, tuple[Tensor, Tensor]] = {}

    def plain(self, module: nn.Module, query: Tensor, key: Tensor, factor: float, mask: Tensor | None) -> None:
        """See `Watcher`."""
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            return
        check_causal(module)
        if key.shape[2] != query.shape[2]:
            raise refusal("keys that are no tokens")
        visible = None if mask is None else visible_keys(mask)
        lengths = self.lengths.to(query.device)
        self.record(layer, *attention_statistics(query, key, factor, lengths, visible))

    def own(self, module: nn.Module, weights: Callable[[], Tensor], mask: Tensor | None) -> None:
        """See `Watcher`."""
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            return
        check_causal(module)
        attention = weights()
        visible = None if mask is None else unmasked(mask)
        self.record(layer, *weight_statistics(square(attention), self.lengths.to(attention.device), visible))

    def compare(self, module: nn.Module, ours: Callable[[], Tensor], own: Callable[[], Tensor]) -> None:
        """See `Watcher`; a recorder trusts what was found when the model was loaded."""

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
        """Row and column signals, each ``[layers, batch, seq]`` float32, first layer first.

        Raises:
            UserError: if a layer did not pass through the hook.
        """
        if sorted(self._signals) != self.layers:
            raise UserError(
                f"model.path: only {len(self._signals)} of the model's {len(self.layers)} layers send their attention "
                "through transformers' AttentionInterface, so saliency cannot be read; use a model with plain "
                "softmax attention in every layer"
            )
        ordered = [self._signals[layer] for layer in self.layers]
        return torch.stack([row for row, _ in ordered]), torch.stack([column for _, column in ordered])


def refusal(what: str) -> NotPlainError:
    """The error for attention that is not one causal softmax over queries and keys in each layer."""
    return NotPlainError(
        f"model.path: the model uses {what}, which saliency does not support; use a model with plain softmax "
        "attention (LLaMA, Mistral, Qwen, OPT, Gemma 3 and the like)"
    )


def check_causal(module: nn.Module) -> None:
    """Refuse an attention module that calls itself not causal."""
    if not getattr(module, "is_causal", True):
        raise refusal("attention that is not causal")


def square(weights: Tensor) -> Tensor:
    """The weights, if they are of tokens on tokens."""
    if weights.shape[-1] != weights.shape[-2]:
        raise refusal("keys that are no tokens")
    return weights


@contextmanager
def watching(watcher: Watcher) -> Iterator[Watcher]:
    """Let ``watcher`` see every attention computed by a hook inside the ``with`` block."""
    token = _watcher.set(watcher)
    try:
        yield watcher
    finally:
        _watcher.reset(token)


@contextmanager
def recording(recorder: SaliencyRecorder) -> Iterator[SaliencyRecorder]:
    """`watching` for a recorder."""
    with watching(recorder):
        yield recorder


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
    watcher = _watcher.get()
    if watcher is not None:
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        watcher.plain(module, query, key, factor, attention_mask)

        def ours() -> Tensor:
            exact = query.float(), key.float(), value.float()
            output: Tensor = sdpa_attention_forward(module, *exact, attention_mask, scaling=scaling, **kwargs)[0]
            return output

        def own() -> Tensor:
            exact = query.float(), key.float(), value.float()
            return run_own(module, *exact, additive(attention_mask, query), scaling, kwargs)[0]

        watcher.compare(module, ours, own)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output, None


def own_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager attention; arguments as for `hooked_attention`, the mask is additive.

    A recorder gets its weights in float32, whatever the model's number format.
    """
    watcher = _watcher.get()
    if watcher is not None:

        def weights() -> Tensor:
            exact = query.float(), key.float(), value.float()
            mask = None if attention_mask is None else attention_mask.float()
            found = run_own(module, *exact, mask, scaling, kwargs)[1]
            if found is None:
                raise refusal("attention whose weights it does not give out")
            return found

        watcher.own(module, weights, attention_mask)
    return run_own(module, query, key, value, attention_mask, scaling, kwargs)


def run_own(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    others: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Output and weights of the eager function in the file of the module's class.

    Raises:
        UserError: if there is none.
    """
    function: AttentionFunction | None = own_function(module)
    if function is None:
        raise refusal("an attention of its own that cannot be read from outside")
    factor = {} if scaling is None else {"scaling": scaling}
    return function(module, query, key, value, mask, **factor, **others)


def own_function(module: nn.Module) -> AttentionFunction | None:
    """What an attention module calls when it is told ``eager``: by convention the function of that name beside it."""
    forward = inspect.unwrap(type(module).forward)
    return getattr(forward, "__globals__", {}).get("eager_attention_forward")


def visible_keys(mask: Tensor) -> Tensor:
    """Which keys a query may see, ``[batch or 1, 1, seq, seq]`` bool, from a bool or an additive mask.

    Raises:
        UserError: if the mask adds a bias to visible scores, or differs between heads.
    """
    if mask.shape[1] != 1:
        raise refusal("a mask of its own for each head")
    seen = unmasked(mask)
    if mask.dtype != torch.bool and not (~seen | (mask == 0)).all():
        raise refusal("a bias in its attention mask")
    return seen


def unmasked(mask: Tensor) -> Tensor:
    """Which keys a bool or an additive mask leaves, a bool of its shape."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def additive(mask: Tensor | None, query: Tensor) -> Tensor:
    """The mask as eager functions want it, float32: 0 where a key may be seen; None is causal."""
    if mask is None:
        seq = query.shape[2]
        mask = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=query.device).tril()
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)


def is_refused(error: Exception) -> bool:
    """True if a class does not take an attention by a name of ours."""
    return any(word in str(error) for word in (NAME, OWN, "scaled_dot_product_attention"))


def register() -> str:
    """Register the hooks with transformers and return the plain one's name; calling it again does no harm."""
    AttentionInterface.register(NAME, hooked_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    AttentionInterface.register(OWN, own_attention)
    AttentionMaskInterface.register(OWN, eager_mask)
    return NAME
