"""Perplexity and IFD against losses that transformers computes on one sequence at a time."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from reference.reference import Tokens
from tiny_models import CHATML


@cache
def model(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def token_losses(method_runs, ids: list[int], template: str | None) -> list[float]:
    """Loss (nats) of every token but the first, which gets NaN."""
    with torch.no_grad():
        logits = model(str(method_runs.model(template)))(torch.tensor([ids])).logits[0]
    log_probabilities = torch.log_softmax(logits.double(), dim=-1)
    return [float("nan")] + [-float(log_probabilities[i - 1, ids[i]]) for i in range(1, len(ids))]


def mean_loss(losses: list[float], kinds: list[str | None]) -> float:
    """Mean over the predicted response tokens, NaN if there are none."""
    wanted = [loss for loss, kind in zip(losses, kinds, strict=True) if kind == "response" and loss == loss]
    return sum(wanted) / len(wanted) if wanted else float("nan")


def given(method_runs, template: str | None = CHATML) -> np.ndarray:
    """Mean response loss of every pool record as it is."""
    tokens = method_runs.tokens(method_runs.pool, template)
    return np.array([mean_loss(token_losses(method_runs, record.ids, template), record.kinds) for record in tokens])


def alone(method_runs, record: Tokens, template: str | None, boundary: int) -> float:
    """Mean response loss of one record without its prompt's tokens."""
    kept = [(token, kind) for token, kind in zip(record.ids, record.kinds, strict=True) if kind != "prompt"]
    if "response" not in record.kinds:
        return float("nan")
    first = record.kinds.index("response")
    if kept[0][1] == "response" and first > 0:
        kept.insert(0, (boundary, None))
    ids, kinds = zip(*kept, strict=True)
    return mean_loss(token_losses(method_runs, list(ids), template), list(kinds))


def ratios(method_runs, template: str | None = CHATML) -> np.ndarray:
    boundary = 0  # id of <|im_start|>, which the tokenizer calls its beginning of text
    records = method_runs.tokens(method_runs.pool, template)
    result = given(method_runs, template) / np.array(
        [alone(method_runs, record, template, boundary) for record in records]
    )
    result[[row for row, record in enumerate(records) if set(record.kinds) == {"response", None}]] = 1.0
    return result


# perplexity


@pytest.mark.parametrize("template", [CHATML, None], ids=["chat", "plain"])
def test_top_and_bottom(method_runs, best_first, template: str | None) -> None:
    expected = given(method_runs, template)
    assert np.isnan(expected).sum() >= 3, "no record without a response"
    top = method_runs.run("method=perplexity", "method.mode=top", "selection.count=6", template=template)
    np.testing.assert_allclose(top.scores.score, expected, atol=2e-5)
    assert top.chosen.tolist() == best_first(top.scores.score)[:6]
    bottom = method_runs.run("method=perplexity", "method.mode=bottom", template=template)
    np.testing.assert_array_equal(bottom.scores.score, -top.scores.score)


def test_middle_is_closeness_to_the_median(method_runs, best_first) -> None:
    losses = given(method_runs)
    scored = sorted(loss for loss in losses if loss == loss)
    half = len(scored) // 2
    median = scored[half] if len(scored) % 2 else (scored[half - 1] + scored[half]) / 2
    result = method_runs.run("method=perplexity", "selection.count=6")
    np.testing.assert_allclose(result.scores.score, -np.abs(losses - median), atol=2e-5)
    assert result.chosen.tolist() == best_first(result.scores.score)[:6]
    places = sorted(scored.index(losses[row]) for row in result.chosen)
    assert places[-1] - places[0] <= 12, "the chosen records lie on both sides of the median"
    assert places[0] < half <= places[-1]


def test_mid_ppl_is_the_originals(method_runs, best_first) -> None:
    """All tokens of the rendered record; a third of the way down from the highest loss."""
    losses = [token_losses(method_runs, record.ids, CHATML)[1:] for record in method_runs.tokens(method_runs.pool)]
    expected = np.array([np.mean(found) if found else np.nan for found in losses])
    expected[method_runs.scoped() == 0] = np.nan
    whole = method_runs.run("method=perplexity", "method.mode=top", "method.tokens=all")
    np.testing.assert_allclose(whole.scores.score, expected, atol=2e-5)
    ranked = best_first(whole.scores.score)
    start = int(len(ranked) * 0.33)
    middle = method_runs.run("method=perplexity", "method.mode=mid_ppl", "method.tokens=all", "selection.count=6")
    assert middle.chosen.tolist() == ranked[start : start + 6]
    assert middle.order.tolist() == ranked[start:] + ranked[:start]
    assert np.nanmax(middle.scores.score) == 1


def test_scope_decides_who_is_scored_but_not_what_is_measured(method_runs) -> None:
    whole = method_runs.run("method=perplexity", "method.mode=top").scores
    prompts = method_runs.run("method=perplexity", "method.mode=top", "scope=prompt").scores
    np.testing.assert_array_equal(prompts.num_scored, method_runs.scoped("prompt"))
    assert np.isnan(prompts.score[9])  # an empty prompt
    assert not np.isnan(whole.score[9])
    rest = [row for row in range(len(method_runs.pool)) if row != 9]
    np.testing.assert_array_equal(prompts.score[rest], whole.score[rest])


# ifd


@pytest.mark.parametrize("template", [CHATML, None], ids=["chat", "plain"])
def test_ratios_of_1_and_more_are_excluded(method_runs, best_first, template: str | None) -> None:
    expected = ratios(method_runs, template)
    helpful = expected < 1
    assert 3 < helpful.sum() < np.isfinite(expected).sum(), "the pool must have both kinds"
    result = method_runs.run("method=ifd", "warmup=none", template=template)
    np.testing.assert_allclose(result.scores.score, np.where(helpful, expected, np.nan), atol=2e-5)
    assert result.order.tolist() == best_first(result.scores.score)
    excluded = int((expected >= 1).sum())
    assert f"{excluded} records have a ratio (IFD) of 1 and more and are excluded" in result.manifest["warnings"]


def test_ratios_of_1_and_more_can_rank_last(method_runs) -> None:
    expected = ratios(method_runs)
    result = method_runs.run("method=ifd", "warmup=none", "method.unhelpful=last")
    order = result.order.tolist()
    helpful = sorted(np.flatnonzero(expected < 1), key=lambda row: -expected[row])
    others = sorted(np.flatnonzero(expected >= 1), key=lambda row: expected[row])
    assert order == [*helpful, *others]
    assert np.all(np.diff(result.scores.score[order]) <= 0)


def test_a_response_that_begins_the_text_without_its_prompt_is_still_predicted(method_runs) -> None:
    """Without a template, row 6 begins with its response once the prompt is gone."""
    record = method_runs.tokens(method_runs.pool, None)[6]
    first = record.kinds.index("response")
    assert set(record.kinds[:first]) == {"prompt"}
    result = method_runs.run("method=ifd", "warmup=none", "method.unhelpful=last", template=None)
    ratio = ratios(method_runs, None)[6]
    assert result.scores.score[6] == pytest.approx(ratio if ratio < 1 else -ratio, abs=2e-5)


def test_a_record_without_a_prompt_has_a_ratio_of_exactly_1(method_runs) -> None:
    result = method_runs.run("method=ifd", "warmup=none", "method.unhelpful=last")
    assert method_runs.pool[9]["prompt"] == ""
    assert result.scores.score[9] == -1


def test_warm_up_is_on_by_default_and_both_passes_use_it(method_runs) -> None:
    warm = method_runs.run("method=ifd", "warmup.epochs=1", "warmup.fraction=0.3")
    cold = method_runs.run("method=ifd", "warmup.epochs=1", "warmup.fraction=0.3", "method.use_warmup=false")
    assert "warmup" in warm.manifest["stages"]
    assert "warmup" not in cold.manifest["stages"]
    assert not np.array_equal(warm.scores.score, cold.scores.score, equal_nan=True)
    off = method_runs.run("method=ifd", "warmup=none")
    told = [
        [line for line in run.manifest["warnings"] if "method=ifd: the original" in line] for run in (warm, cold, off)
    ]
    assert [len(lines) for lines in told] == [0, 1, 1]


def test_cost_is_that_of_two_passes(method_runs) -> None:
    perplexity = method_runs.run("method=perplexity").manifest["stages"]["score"]
    ifd = method_runs.run("method=ifd", "warmup=none").manifest["stages"]["score"]
    records = method_runs.tokens(method_runs.pool)
    whole = sum(len(record.ids) for record in records)
    without = sum(sum(kind != "prompt" for kind in record.kinds) for record in records if "response" in record.kinds)
    assert perplexity["tokens"] == whole
    assert ifd["tokens"] == whole + without
