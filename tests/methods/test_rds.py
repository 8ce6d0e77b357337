"""RDS+ against position-weighted means over transformers' own hidden states in float64."""

from __future__ import annotations

import itertools

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


def named_in_turns(queues: list[list[int]]) -> list[int]:
    """Every queue in its turn names its next record; one that is named already counts once."""
    return list(dict.fromkeys(row for turn in itertools.zip_longest(*queues) for row in turn if row is not None))


def best_in_turns(queues: list[list[int]]) -> list[int]:
    """Every queue in its turn gives its first record that is not taken."""
    taken: list[int] = []
    while len(taken) < len({row for queue in queues for row in queue}):
        for queue in queues:
            taken += [row for row in queue if row not in taken][:1]
    return taken


@pytest.fixture(scope="module")
def singles(method_runs, expected) -> list[np.ndarray]:
    """Scores against each target."""
    by_id = method_runs.run("method=rds", "method.aggregate=max", "target.group_field=id")
    scores = [by_id.scores.groups[f"r{place}"] for place in range(4)]
    np.testing.assert_allclose(np.stack(scores), expected, atol=2e-5)
    return scores


def test_single_targets_take_turns_as_in_the_authors_code(method_runs, singles, best_first) -> None:
    """By default, with no ids and drawn targets as well; the score is the best target's."""
    result = method_runs.run("method=rds", "selection.count=5")
    queues = [best_first(scores) for scores in singles]
    assert result.order.tolist() == named_in_turns(queues) != best_in_turns(queues)
    assert result.chosen.tolist() == named_in_turns(queues)[:5]
    np.testing.assert_array_equal(result.scores.score, np.max(singles, axis=0))
    assert result.order.tolist() != best_first(result.scores.score)
    drawn = method_runs.run("method=rds", "target.num_examples=2", "seed=5")
    pairs = [
        pair for pair in itertools.permutations(range(4), 2)
        if np.array_equal(drawn.scores.score, np.max([singles[place] for place in pair], axis=0), equal_nan=True)
    ]  # fmt: skip
    assert drawn.order.tolist() in [named_in_turns([queues[place] for place in pair]) for pair in pairs]


def test_groups_take_turns_on_request(method_runs, expected, best_first) -> None:
    result = method_runs.run(
        "method=rds", "method.aggregate=max", "target.group_field=id", "target.aggregate=round_robin"
    )
    queues = [best_first(result.scores.groups[f"r{place}"]) for place in range(4)]
    assert result.order.tolist() == best_in_turns(queues)
    np.testing.assert_allclose(np.stack(list(result.scores.groups.values())), expected, atol=2e-5)


def test_turns_of_targets_within_turns_of_groups(method_runs, expected, singles, best_first) -> None:
    queues = [best_first(scores) for scores in singles]
    grouped = ("method=rds", "target.group_field=subtask")
    nested = method_runs.run(*grouped, "target.aggregate=round_robin")
    assert nested.order.tolist() == best_in_turns([named_in_turns(queues[0::2]), named_in_turns(queues[1::2])])
    together = method_runs.run(*grouped)
    assert together.order.tolist() == named_in_turns([queues[place] for place in (0, 2, 1, 3)])
    for result in (nested, together):
        np.testing.assert_allclose(result.scores.groups["second"], expected[1::2].max(0), atol=2e-5)
        np.testing.assert_allclose(result.scores.score, expected.max(0), atol=2e-5)


def test_groups_whose_targets_take_turns_are_not_averaged(method_runs, tmp_path) -> None:
    wanted = r"target\.aggregate=mean: with method\.aggregate=round_robin targets take turns"
    with pytest.raises(UserError, match=wanted):
        method_runs.run("method=rds", "target.group_field=subtask", "target.aggregate=mean", store=tmp_path)
    assert not (tmp_path / "vectors").exists(), "refused before any pass"
    method_runs.run("method=rds", "target.aggregate=mean")  # without groups there is nothing to average


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
