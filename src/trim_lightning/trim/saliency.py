"""Saliency of tokens: from attention (paper: its entropy, and attention received), and from the model's error."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6  # the least weight of a scoped token, so that no fingerprint is empty
BLOCK_ELEMENTS = 4_194_304  # float32 scores held at once: 16 MiB a buffer


def attention_statistics(
    query: Tensor,
    key: Tensor,
    scaling: float,
    lengths: Tensor,
    visible: Tensor | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Reduce one layer's attention to a row and a column signal without holding an n x n matrix.

    Attention is recomputed in float32 for a block of queries at a time: memory grows with block x n.
    Row: mean over heads of ``1 - H_i / log|V_i|``, 0 where ``|V_i| = 1`` (entropy is the paper's, the
    normalisation by ``log|V_i|`` is our choice). Column: mean over heads of the attention that token j gets
    from the queries that may see it (attention received is the paper's, the mean over viewers is our choice).

    Args:
        query: ``[batch, heads, seq, head_dim]``, after position encoding.
        key: ``[batch, kv_heads, seq, head_dim]``, before head repetition; ``heads`` is a multiple of ``kv_heads``.
        scaling: Factor of the dot products.
        lengths: ``[batch]`` real tokens of each sequence; padding is on the right.
        visible: ``[batch or 1, 1, seq, seq]`` bool, True where a query may see a key. None means causal.
        block_elements: Attention scores computed at once.

    Returns:
        Two float32 tensors ``[batch, seq]``: row and column signal, 0 at padding.
    """
    batch, heads, seq, head_dim = query.shape
    kv_heads = key.shape[1]
    keys = key.float().unsqueeze(2).transpose(-1, -2)  # [batch, kv_heads, 1, head_dim, seq]
    position = torch.arange(seq, device=query.device)
    real = position < lengths[:, None]  # [batch, seq]
    row = torch.zeros(batch, seq, device=query.device)
    column = torch.zeros(batch, seq, device=query.device)
    viewers = torch.zeros(batch, seq, device=query.device)
    block = max(1, min(seq, block_elements // (batch * heads * seq)))
    for start in range(0, seq, block):
        end = min(seq, start + block)
        # causal: no query of this block sees a key beyond its end
        scaled = query[:, :, start:end].float() * scaling
        scores = scaled.reshape(batch, kv_heads, heads // kv_heads, end - start, head_dim) @ keys[..., :end]
        seen = position[None, None, :end] <= position[None, start:end, None]  # [1, block, end]
        if visible is not None:
            seen = seen & visible[:, 0, start:end, :end]
        hidden = ~seen[:, None, None]
        scores.masked_fill_(hidden, float("-inf"))
        # now log attention; the bound keeps a padded query that sees no key from spreading NaN
        scores -= torch.logsumexp(scores, dim=-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        attention = scores.exp()
        scores.masked_fill_(hidden, 0.0)  # 0 log 0 = 0
        entropy = -scores.mul_(attention).sum(-1)  # [batch, kv_heads, group, block]
        ceiling = seen.sum(-1).float().log()  # log|V_i|, [batch or 1, block]
        sharpness = 1 - (entropy / ceiling[:, None, None]).clamp_(0, 1)
        sharpness = torch.where(ceiling[:, None, None] > 0, sharpness, torch.zeros_like(sharpness))
        row[:, start:end] = sharpness.mean((1, 2))
        asking = real[:, start:end].float()
        column[:, :end] += torch.einsum("bkgqj,bq->bj", attention, asking)
        viewers[:, :end] += torch.einsum("bqj,bq->bj", seen.float().expand(batch, -1, -1), asking)
    column /= heads * viewers.clamp(min=1)
    return row * real, column * real


def weight_statistics(weights: Tensor, lengths: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same two signals from attention weights that are there already: those that the model itself computes.

    What a row gives to no token (an attention sink's share) is dropped and the row made to sum to 1 (our choice). A row
    that gives nothing to any token says nothing: 0.

    Args:
        weights: ``[batch, heads, seq, seq]``.
        lengths: ``[batch]`` real tokens of each sequence; padding is on the right.
        visible: ``[batch or 1, heads or 1, seq, seq]`` bool, True where a query may see a key. None means causal.

    Returns:
        Two float32 tensors ``[batch, seq]``: row and column signal, 0 at padding.
    """
    seq = weights.shape[-1]
    position = torch.arange(seq, device=weights.device)
    real = position < lengths[:, None]
    seen = (position <= position[:, None])[None, None]
    seen = (seen if visible is None else seen & visible).expand(weights.shape)
    attention = weights.float() * seen
    total = attention.sum(-1, keepdim=True)
    attention = attention / total.clamp(min=torch.finfo(torch.float32).tiny)
    entropy = -torch.special.xlogy(attention, attention).sum(-1)  # [batch, heads, seq]
    ceiling = seen.sum(-1).float().log()
    certain = (ceiling > 0) & (total[..., 0] > 0)
    sharpness = torch.where(certain, 1 - (entropy / ceiling.clamp(min=FLOOR)).clamp(0, 1), 0.0)
    asking = real[:, None, :, None]
    received = (attention * asking).sum(2) / (seen & asking).sum(2).clamp(min=1)
    return sharpness.mean(1) * real, received.mean(1) * real


def scale(signal: Tensor, normalize: str = "minmax") -> Tensor:
    """Min-max scale one signal of one sequence to [0, 1] (our choice).

    Args:
        signal: ``[scoped]`` values of the scoped tokens of one sequence.
        normalize: ``minmax``, or ``none`` to leave it as it is.

    Returns:
        ``[scoped]`` float32; a constant signal becomes 1.
    """
    signal = signal.float()
    if normalize == "none" or signal.numel() == 0:
        return signal
    low, high = signal.min(), signal.max()
    if high == low:
        return torch.ones_like(signal)
    return (signal - low) / (high - low)


def combine(
    row: Tensor,
    column: Tensor,
    row_weight: float = 0.5,
    column_weight: float = 0.5,
    error: Tensor | None = None,
    error_weight: float = 0.0,
) -> Tensor:
    """Weigh the signals into the saliency alpha (paper: row and column, 0.5 each), floored at 1e-6.

    Args:
        row: ``[scoped]`` scaled row signal.
        column: ``[scoped]`` scaled column signal.
        row_weight: Weight of the row signal.
        column_weight: Weight of the column signal. All weights 0 means uniform saliency 1.
        error: ``[scoped]`` in [0, 1], see `token_saliency`; only needed with a weight.
        error_weight: Weight of the error (our choice).

    Returns:
        ``[scoped]`` float32.
    """
    alpha = row_weight * row + column_weight * column
    if error_weight and error is not None:
        alpha = alpha + error_weight * error
    elif row_weight == 0 and column_weight == 0:
        return torch.ones_like(row)
    return alpha.clamp(min=FLOOR)


def token_saliency(
    row_layers: Tensor,
    column_layers: Tensor,
    scope: Tensor,
    *,
    num_layers: int = 6,
    row_weight: float = 0.5,
    column_weight: float = 0.5,
    normalize: str = "minmax",
    probability: Tensor | None = None,
    error_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn per-layer signals of one sequence into scaled row, scaled column and combined saliency.

    The error of a token is ``1 - p``, p being the model's probability of it after all that stands before: what the
    model still gets wrong. It is not scaled.

    Args:
        row_layers: ``[layers, seq]`` row signal of each layer (mean over heads), first layer first.
        column_layers: ``[layers, seq]`` column signal of each layer.
        scope: ``[seq]`` bool, the scoped tokens S.
        num_layers: Last layers to average.
        row_weight: Weight of the row signal.
        column_weight: Weight of the column signal.
        normalize: See `scale`.
        probability: ``[seq]`` p of each token, NaN of the first, which nothing predicts and whose error is 0.
        error_weight: Weight of the error.

    Returns:
        Three float32 tensors ``[scoped]``: row, column, alpha.

    Raises:
        ValueError: if there are fewer than ``num_layers`` layers.
    """
    layers = row_layers.shape[0]
    if num_layers > layers:
        raise ValueError(f"{num_layers} layers asked, {layers} present")
    row = scale(row_layers[layers - num_layers :].mean(0)[scope], normalize)
    column = scale(column_layers[layers - num_layers :].mean(0)[scope], normalize)
    error = None if probability is None else (1 - probability[scope].float()).nan_to_num(0.0)
    return row, column, combine(row, column, row_weight, column_weight, error, error_weight)
