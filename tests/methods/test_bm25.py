"""BM25 against Lucene's formula in plain Python."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from trim_lightning.errors import UserError


def words(record: dict[str, str], scope: str) -> list[str]:
    fields = {"all": ("prompt", "response"), "prompt": ("prompt",), "response": ("response",)}[scope]
    return re.findall(r"\w+", " ".join(record[field] for field in fields).lower())


def bm25(query: list[str], documents: list[list[str]], k1: float, b: float) -> list[float]:
    """Score every document: sum over the query's words, repeated ones counted again."""
    mean_length = sum(map(len, documents)) / len(documents)
    frequency = Counter(word for document in documents for word in set(document))
    scores = []
    for document in documents:
        counts, score = Counter(document), 0.0
        for word in query:
            if counts[word]:
                df = frequency[word]
                idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
                score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(document) / mean_length))
        scores.append(score)
    return scores


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("scope", "k1", "b", "aggregate"),
    [("all", 1.5, 0.75, "max"), ("prompt", 1.5, 0.75, "mean"), ("response", 0.9, 0.4, "max")],
)
def test_scores(method_runs, best_first, scope: str, k1: float, b: float, aggregate: str) -> None:
    result = method_runs.run(
        "method=bm25", f"scope={scope}", f"method.k1={k1}", f"method.b={b}", f"method.aggregate={aggregate}",
        "selection.count=6",
    )  # fmt: skip
    documents = [words(record, scope) for record in method_runs.pool]
    table = np.array([bm25(words(target, scope), documents, k1, b) for target in method_runs.targets])
    expected = table.max(0) if aggregate == "max" else table.mean(0)
    expected[method_runs.scoped(scope) == 0] = np.nan
    np.testing.assert_allclose(result.scores.score, expected, rtol=1e-5, atol=1e-6)
    assert result.chosen.tolist() == best_first(result.scores.score)[:6]
    # a copy of another record scores the same and ranks after it
    ranked = result.order.tolist()
    assert result.scores.score[0] == result.scores.score[8]
    assert ranked.index(0) < ranked.index(8)


def test_groups(method_runs) -> None:
    documents = [words(record, "all") for record in method_runs.pool]
    table = np.array([bm25(words(target, "all"), documents, 1.5, 0.75) for target in method_runs.targets])
    table[:, method_runs.scoped() == 0] = np.nan
    expected = {"first": table[[0, 2]].max(0), "second": table[[1, 3]].max(0)}
    grouped = ["method=bm25", "target.group_field=subtask"]
    result = method_runs.run(*grouped)
    for group, scores in expected.items():
        np.testing.assert_allclose(result.scores.groups[group], scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.scores.score, table.max(0), rtol=1e-5, atol=1e-6)
    mean = method_runs.run(*grouped, "target.aggregate=mean").scores.score
    np.testing.assert_allclose(mean, sum(expected.values()) / 2, rtol=1e-5, atol=1e-6)


def test_round_robin_lets_groups_take_turns(method_runs, best_first) -> None:
    result = method_runs.run("method=bm25", "target.group_field=subtask", "target.aggregate=round_robin")
    queues = [best_first(result.scores.groups[group]) for group in ("first", "second")]
    expected: list[int] = []
    while len(expected) < len(queues[0]):
        for queue in queues:
            free = [row for row in queue if row not in expected]
            expected += free[:1]
    assert result.order.tolist() == expected


def test_round_robin_lets_single_targets_take_turns(method_runs, best_first) -> None:
    by_id = method_runs.run("method=bm25", "target.group_field=id").scores
    result = method_runs.run("method=bm25", "method.aggregate=round_robin")
    queues = [best_first(scores) for scores in by_id.groups.values()]
    named = list(dict.fromkeys(row for turn in zip(*queues, strict=True) for row in turn))
    assert result.order.tolist() == named != best_first(by_id.score)
    np.testing.assert_array_equal(result.scores.score, by_id.score)


def test_targets_without_a_word_are_a_user_error(method_runs, tmp_path) -> None:
    (tmp_path / "dots.jsonl").write_text('{"prompt": "?!", "response": "..."}\n')
    with pytest.raises(UserError, match="target: the target set has no word in scope=all; give targets with text"):
        method_runs.run("method=bm25", f"target.path={tmp_path}/dots.jsonl")


def test_a_pool_without_words_scores_zero(method_runs, tmp_path) -> None:
    (tmp_path / "dots.jsonl").write_text('{"prompt": "?!", "response": "..."}\n' * 2)
    result = method_runs.run("method=bm25", f"pool.path={tmp_path}/dots.jsonl")
    assert result.scores.score.tolist() == [0, 0]
    assert result.order.tolist() == [0, 1]
