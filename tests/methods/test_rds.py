"""RDS+ against position-weighted means over transformers' own hidden states in float64."""

from __future__ import annotations

import numpy as np
import pytest

from reference.reference import Tokens
from trim_lightning.errors import UserError


def vector(method_runs, tokens: Tokens, kinds: tuple[str, ...] | None) -> np.ndarray:
    """The pooled vector of one record, token by token."""
    hidden = method_runs.reference().forward(tokens.ids)[0]
    total, mass = np.zeros(hidden.shape[1]), 0.0
    for place, (state, kind) in enumerate(zip(hidden, tokens.kinds, strict=True), start=1):
        if kinds is None or kind in kinds:
            total += place * state
            mass += place
    return total / max(mass, 1.0)


def cosines(method_runs, kinds: tuple[str, ...] | None = None) -> np.ndarray:
    """``[targets, records]`` cosines; NaN for records without content."""
    pool, targets = (
        np.array([vector(method_runs, tokens, kinds) for tokens in method_runs.tokens(records)])
        for records in (method_runs.pool, method_runs.targets)
    )
    pool[method_runs.scoped() == 0] = np.nan
    norms = np.linalg.norm(targets, axis=1)[:, None] * np.linalg.norm(pool, axis=1)
    with np.errstate(invalid="ignore"):  # a record without a token of these kinds
        return targets @ pool.T / norms


@pytest.fixture(scope="module")
def expected(method_runs) -> np.ndarray:
    return cosines(method_runs)


@pytest.mark.parametrize("aggregate", ["max", "mean"])
def test_scores(method_runs, expected, best_first, aggregate: str) -> None:
    result = method_runs.run("method=rds", f"method.aggregate={aggregate}", "selection.count=6")
    scores = expected.max(0) if aggregate == "max" else expected.mean(0)
    np.testing.assert_allclose(result.scores.score, scores, atol=2e-5)
    assert result.chosen.tolist() == best_first(result.scores.score)[:6]
    ranked = result.order.tolist()
    assert ranked.index(0) < ranked.index(8), "row 8 is a copy of row 0"


def test_only_scoped_tokens_on_request(method_runs) -> None:
    result = method_runs.run("method=rds", "method.tokens=scoped", "scope=prompt", "scoring.tokens_per_batch=200")
    scores = cosines(method_runs, ("prompt",)).max(0)
    scores[method_runs.scoped("prompt") == 0] = np.nan
    np.testing.assert_allclose(result.scores.score, scores, atol=2e-5)


def test_groups(method_runs, expected) -> None:
    result = method_runs.run("method=rds", "target.group_field=subtask")
    for place, group in enumerate(("first", "second")):
        np.testing.assert_allclose(result.scores.groups[group], expected[place::2].max(0), atol=2e-5)


def test_targets_take_turns_as_in_the_paper(method_runs, expected, best_first) -> None:
    result = method_runs.run("method=rds", "target.group_field=id", "target.aggregate=round_robin")
    queues = [best_first(result.scores.groups[f"r{place}"]) for place in range(4)]
    taken: list[int] = []
    while len(taken) < len(queues[0]):
        for queue in queues:
            taken += [row for row in queue if row not in taken][:1]
    assert result.order.tolist() == taken
    np.testing.assert_allclose(np.stack(list(result.scores.groups.values())), expected, atol=2e-5)


def test_warm_up_is_asked_for_twice(method_runs) -> None:
    plain = method_runs.run("method=rds", "warmup=none")
    ignored = method_runs.run("method=rds", "warmup.epochs=1")
    warmed = method_runs.run("method=rds", "warmup.epochs=1", "warmup.fraction=0.3", "method.use_warmup=true")
    disabled = method_runs.run("method=rds", "warmup=none", "method.use_warmup=true")
    assert [("warmup" in run.manifest["stages"]) for run in (plain, ignored, warmed, disabled)] == [0, 0, 1, 0]
    np.testing.assert_array_equal(plain.scores.score, ignored.scores.score)
    np.testing.assert_array_equal(plain.scores.score, disabled.scores.score)
    assert np.nanmax(np.abs(warmed.scores.score - plain.scores.score)) > 1e-6


def test_other_targets_need_no_new_pass_over_the_pool(method_runs) -> None:
    method_runs.run("method=rds")
    result = method_runs.run("method=rds", "target.num_examples=2", "seed=5")
    vectors = list((method_runs.root / "store" / "vectors").iterdir())
    again = method_runs.run("method=rds", "target.num_examples=1", "seed=6")
    assert len(list((method_runs.root / "store" / "vectors").iterdir())) == len(vectors) + 1
    tokens = sum(len(tokens.ids) for tokens in method_runs.tokens(method_runs.pool))
    assert result.manifest["stages"]["score"]["tokens"] == tokens
    assert again.manifest["stages"]["score"]["tokens"] == tokens


def test_targets_out_of_scope_are_a_user_error(method_runs, tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"prompt": "words", "response": ""}\n')
    with pytest.raises(UserError, match="no token in scope=response"):
        method_runs.run("method=rds", "scope=response", f"target.path={tmp_path}/empty.jsonl")
