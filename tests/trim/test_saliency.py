"""Saliency against a full-matrix float64 computation, its bounds and its memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trim_lightning.trim.saliency import BLOCK_ELEMENTS, FLOOR, attention_statistics, combine, scale, token_saliency

signals = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20).map(torch.tensor)
weights = st.floats(0, 2, width=16)


def naive(query: Tensor, key: Tensor, scaling: float, lengths: list[int], visible: Tensor) -> tuple[Tensor, Tensor]:
    """The two signals from whole attention matrices, one sequence and one head at a time, in float64."""
    batch, heads, seq, _ = query.shape
    group = heads // key.shape[1]
    row, column = torch.zeros(batch, seq, dtype=torch.float64), torch.zeros(batch, seq, dtype=torch.float64)
    for b, n in enumerate(lengths):
        see = visible[b % len(visible), 0, :n, :n] & torch.ones(n, n, dtype=torch.bool).tril()
        size = see.sum(-1)
        for h in range(heads):
            scores = query[b, h, :n].double() @ key[b, h // group, :n].double().T * scaling
            attention = scores.masked_fill(~see, -math.inf).softmax(-1)
            entropy = -torch.special.xlogy(attention, attention).sum(-1)
            certain = 1 - entropy / size.clamp(min=2).log()
            row[b, :n] += torch.where(size > 1, certain, 0) / heads
            column[b, :n] += attention.sum(0) / see.sum(0) / heads
    return row, column


def window_mask(seq: int, window: int | None) -> Tensor:
    """``[1, 1, seq, seq]``: the last ``window`` keys up to and with the query's own."""
    age = torch.arange(seq)[:, None] - torch.arange(seq)
    return ((age >= 0) & (age < (window or seq)))[None, None]


@st.composite
def attention_inputs(draw: st.DrawFn, windows: bool = True) -> dict[str, Any]:
    """Query, key, lengths and mask of one layer; any grouping of heads, two number formats."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    seq, head_dim = draw(st.integers(1, 24)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    sharpness = draw(st.sampled_from([0.1, 1.0, 3.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return {
        "query": (sharpness * torch.randn(batch, kv_heads * group, seq, head_dim, generator=generator)).to(dtype),
        "key": torch.randn(batch, kv_heads, seq, head_dim, generator=generator).to(dtype),
        "scaling": head_dim**-0.5,
        "lengths": torch.tensor(draw(st.lists(st.integers(1, seq), min_size=batch, max_size=batch))),
        "visible": window_mask(seq, draw(st.none() | st.integers(1, seq))) if windows else None,
    }


# ------------------------------------------------------------------------------------- the two signals


@given(inputs=attention_inputs(), block_elements=st.integers(1, 3000))
def test_blocks_of_any_size_equal_the_full_matrix(inputs: dict[str, Any], block_elements: int) -> None:
    expected = naive(**inputs | {"lengths": inputs["lengths"].tolist()})
    whole = attention_statistics(**inputs)
    blocks = attention_statistics(**inputs, block_elements=block_elements)
    for name, exact, one, many in zip(("row", "column"), expected, whole, blocks, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), exact, rtol=0, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(many, one, rtol=0, atol=1e-6)


@given(attention_inputs(windows=False))
def test_no_mask_means_causal(inputs: dict[str, Any]) -> None:
    seq = inputs["query"].shape[2]
    masked = attention_statistics(**inputs | {"visible": window_mask(seq, None)})
    torch.testing.assert_close(attention_statistics(**inputs), masked, rtol=0, atol=0)


@given(attention_inputs())
def test_signals_lie_between_0_and_1_and_are_0_at_padding(inputs: dict[str, Any]) -> None:
    padding = torch.arange(inputs["query"].shape[2]) >= inputs["lengths"][:, None]
    for signal in attention_statistics(**inputs):
        assert ((signal >= 0) & (signal <= 1 + 1e-6)).all()
        assert (signal[padding] == 0).all()


@given(inputs=attention_inputs(), hides_padding=st.booleans(), extra=st.integers(0, 5))
def test_padding_changes_nothing(inputs: dict[str, Any], hides_padding: bool, extra: int) -> None:
    query, key, visible = inputs["query"], inputs["key"], inputs["visible"]
    lengths, seq = inputs["lengths"], query.shape[2]
    wide = torch.nn.functional.pad(visible, (0, extra, 0, extra), value=True)
    if hides_padding:  # then a padded query of a sliding window may see no key at all
        wide = wide & (torch.arange(seq + extra) < lengths[:, None])[:, None, None]
    filled = [
        torch.nn.functional.pad(tensor, (0, 0, 0, extra)).masked_fill_(
            (torch.arange(seq + extra) >= lengths[:, None])[:, None, :, None], 50.0
        )
        for tensor in (query, key)
    ]
    padded = attention_statistics(*filled, inputs["scaling"], lengths, wide)
    for b, n in enumerate(lengths.tolist()):
        alone = attention_statistics(
            query[b : b + 1, :, :n],
            key[b : b + 1, :, :n],
            inputs["scaling"],
            lengths[b : b + 1],
            visible[:, :, :n, :n],
        )
        for one, many in zip(alone, padded, strict=True):
            torch.testing.assert_close(many[b, :n], one[0], rtol=0, atol=1e-6)


@given(attention_inputs(windows=False))
def test_a_query_that_sees_one_key_has_no_row_signal(inputs: dict[str, Any]) -> None:
    row, _ = attention_statistics(**inputs)
    assert (row[:, 0] == 0).all()
    seq = inputs["query"].shape[2]
    row, column = attention_statistics(**inputs | {"visible": window_mask(seq, 1)})
    real = (torch.arange(seq) < inputs["lengths"][:, None]).float()
    assert (row == 0).all()
    torch.testing.assert_close(column, real, rtol=0, atol=1e-6)


@given(inputs=attention_inputs(), window=st.none() | st.integers(1, 24))
def test_uniform_attention_has_no_row_signal(inputs: dict[str, Any], window: int | None) -> None:
    query, seq = torch.zeros_like(inputs["query"]), inputs["query"].shape[2]
    visible = window_mask(seq, window)
    row, column = attention_statistics(**inputs | {"query": query, "visible": visible})
    assert row.abs().max() <= 2e-6
    share = visible[0, 0].double() / visible[0, 0].sum(-1, keepdim=True)
    for b, n in enumerate(inputs["lengths"].tolist()):
        mean = share[:n, :n].sum(0) / visible[0, 0, :n, :n].sum(0)
        torch.testing.assert_close(column[b, :n].double(), mean, rtol=0, atol=1e-6)


def test_attention_to_one_key_has_row_signal_1_and_column_signal_1_there() -> None:
    seq = 6
    query, key = torch.zeros(1, 1, seq, seq), torch.zeros(1, 1, seq, seq)
    query[..., 0] = 1000.0
    key[0, 0, 0, 0] = 1.0
    row, column = attention_statistics(query, key, 1.0, torch.tensor([seq]))
    assert row.tolist() == [[0.0] + [1.0] * (seq - 1)]
    assert column.tolist() == [[1.0] + [0.0] * (seq - 1)]


def test_extreme_scores_stay_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (1e4 * torch.randn(1, 2, 9, 4, generator=generator) for _ in range(2))
    for signal in attention_statistics(query, key, 1.0, torch.tensor([9])):
        assert torch.isfinite(signal).all()


class Allocations(TorchDispatchMode):
    """Records the elements of the largest floating-point and of the largest other tensor made by any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.floats = self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if not isinstance(tensor, Tensor) or func.is_view:
                continue
            if tensor.is_floating_point():
                self.floats = max(self.floats, tensor.numel())
            else:
                self.others = max(self.others, tensor.numel())
        return result


@pytest.mark.parametrize("window", [None, 64])
def test_memory_grows_with_the_block_and_not_with_the_square(window: int | None) -> None:
    seq, heads, block = 2048, 2, 64
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, heads, seq, 8, generator=generator), torch.randn(1, 1, seq, 8, generator=generator)
    visible = None if window is None else window_mask(seq, window)
    lengths = torch.tensor([seq])
    with Allocations() as seen:
        small = attention_statistics(query, key, 0.3, lengths, visible, block_elements=heads * seq * block)
    assert heads * seq * (block - 1) <= seen.floats <= heads * seq * block == seq * seq / 16
    assert seen.others <= seq * block
    with Allocations() as seen:
        whole = attention_statistics(query, key, 0.3, lengths, visible)
    assert seen.floats <= BLOCK_ELEMENTS
    for one, many in zip(whole, small, strict=True):
        torch.testing.assert_close(many, one, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- scaling and weighing


@given(signals)
def test_minmax_reaches_0_and_1_and_keeps_the_order(signal: Tensor) -> None:
    scaled = scale(signal)
    assert scaled.dtype == torch.float32
    if signal.min() == signal.max():
        assert (scaled == 1).all()
        return
    assert scaled.min() == 0
    assert scaled.max() == 1
    assert (scaled[signal.argsort(stable=True)].diff() >= 0).all()


@given(value=st.floats(-1, 1, width=32), size=st.integers(1, 9))
def test_a_constant_signal_becomes_1(value: float, size: int) -> None:
    assert scale(torch.full((size,), value)).tolist() == [1.0] * size


@given(signals)
def test_scaling_can_be_left_out(signal: Tensor) -> None:
    assert torch.equal(scale(signal, "none"), signal)
    assert scale(torch.empty(0)).shape == (0,)


@given(data=st.data(), row=signals, row_weight=weights, column_weight=weights)
def test_alpha_is_the_weighted_sum_above_a_floor(
    data: st.DataObject, row: Tensor, row_weight: float, column_weight: float
) -> None:
    size = len(row)
    column = torch.tensor(data.draw(st.lists(st.floats(0, 1, width=32), min_size=size, max_size=size)))
    alpha = combine(row, column, row_weight, column_weight)
    assert (alpha >= FLOOR * (1 - 1e-6)).all()
    if row_weight == 0 and column_weight == 0:
        assert alpha.tolist() == [1.0] * size
        return
    for got, r, c in zip(alpha.tolist(), row.tolist(), column.tolist(), strict=True):
        assert got == pytest.approx(max(row_weight * r + column_weight * c, 1e-6), rel=1e-5)


def test_default_weights_are_a_half_each() -> None:
    assert combine(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 0.0, 1.0])).tolist() == [
        0.5,
        pytest.approx(1e-6),
        0.75,
    ]


def test_the_error_is_what_the_model_did_not_expect_and_the_first_token_has_none() -> None:
    layers, scope = torch.rand(2, 4), torch.tensor([True, True, False, True])
    probability = torch.tensor([float("nan"), 0.25, 0.9, 1.0])
    *_, alone = token_saliency(
        layers, layers, scope, num_layers=1, row_weight=0, column_weight=0, probability=probability, error_weight=1
    )
    assert alone.tolist() == pytest.approx([FLOOR, 0.75, FLOOR])
    row, column, both = token_saliency(layers, layers, scope, num_layers=1, probability=probability, error_weight=2)
    expected = (0.5 * row + 0.5 * column + 2 * torch.tensor([0.0, 0.75, 0.0])).clamp(min=FLOOR)
    assert both.tolist() == pytest.approx(expected.tolist())
    *_, without = token_saliency(layers, layers, scope, num_layers=1, probability=probability)
    assert without.tolist() == combine(row, column).tolist()


@settings(max_examples=50)
@given(data=st.data(), layers=st.integers(1, 5), seq=st.integers(1, 10), seed=st.integers(0, 999))
def test_token_saliency_averages_the_last_layers_over_the_scope(
    data: st.DataObject, layers: int, seq: int, seed: int
) -> None:
    number = data.draw(st.integers(1, layers))
    scope = torch.tensor(data.draw(st.lists(st.booleans(), min_size=seq, max_size=seq)))
    generator = torch.Generator().manual_seed(seed)
    row_layers, column_layers = (torch.rand(layers, seq, generator=generator) for _ in range(2))
    row, column, alpha = token_saliency(row_layers, column_layers, scope, num_layers=number)
    kept = [place for place in range(seq) if scope[place]]
    for got, source in ((row, row_layers), (column, column_layers)):
        means = [sum(float(source[layer, at]) for layer in range(layers - number, layers)) / number for at in kept]
        low, high = min(means, default=0), max(means, default=0)
        expected = [(mean - low) / (high - low) if len(kept) > 1 else 1.0 for mean in means]
        assert got.tolist() == pytest.approx(expected, abs=1e-5)
    expected_alpha = [max(0.5 * float(r) + 0.5 * float(c), FLOOR) for r, c in zip(row, column, strict=True)]
    assert alpha.tolist() == pytest.approx(expected_alpha, abs=1e-6)


def test_more_layers_than_there_are_is_an_error() -> None:
    layers = torch.rand(2, 3)
    with pytest.raises(ValueError, match="3 layers asked, 2 present"):
        token_saliency(layers, layers, torch.ones(3, dtype=torch.bool), num_layers=3)
