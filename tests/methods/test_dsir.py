"""DSIR against a plain Python reference that hashes every n-gram by itself."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from trim_lightning.errors import UserError
from trim_lightning.methods.dsir import log_ratios

MASK = 2**64 - 1
BUCKETS = 50  # so few that buckets are shared


def words(record: dict[str, str]) -> list[str]:
    return re.findall(r"\w+|[^\w\s]+", f"{record['prompt']}\n{record['response']}".lower())


def mixed(value: int) -> int:
    """The finaliser of splitmix64 on Python's unbounded integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def ngrams(record: dict[str, str], buckets: int) -> Counter[int]:
    """How often each bucket occurs in a record."""
    hashes = [
        int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") for word in words(record)
    ]
    pairs = [mixed((mixed(first) + second) & MASK) for first, second in itertools.pairwise(hashes)]
    return Counter(value % buckets for value in [*hashes, *pairs])


def weights(
    pool: list[dict[str, str]], targets: list[dict[str, str]], buckets: int, smoothing: float
) -> tuple[list[float], list[int]]:
    """Log importance weight and number of n-grams of every pool record."""
    records = [ngrams(record, buckets) for record in pool]
    seen = sum(records, Counter())
    wanted = sum((ngrams(target, buckets) for target in targets), Counter())
    total, size = sum(seen.values()), sum(wanted.values())
    result = []
    for record in records:
        logarithms = 0.0
        for bucket, count in record.items():
            p = seen[bucket] / total
            q = (wanted[bucket] + smoothing * p) / (size + smoothing)
            logarithms += count * math.log(q / p)
        result.append(logarithms)
    return result, [sum(record.values()) for record in records]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("buckets", "smoothing"), [(BUCKETS, 3000.0), (10_000, 5.0)])
def test_scores(method_runs, best_first, buckets: int, smoothing: float) -> None:
    result = method_runs.run(
        "method=dsir", f"method.buckets={buckets}", f"method.smoothing={smoothing}", "selection.count=6"
    )
    expected, sizes = weights(method_runs.pool, method_runs.targets, buckets, smoothing)
    expected = np.where(method_runs.scoped() > 0, expected, np.nan)
    np.testing.assert_allclose(result.scores.score, expected, rtol=1e-5, atol=1e-5)
    assert result.chosen.tolist() == best_first(result.scores.score)[:6]
    per_ngram = method_runs.run(
        "method=dsir", f"method.buckets={buckets}", f"method.smoothing={smoothing}", "method.per_ngram=true"
    )
    np.testing.assert_allclose(per_ngram.scores.score, expected / np.maximum(sizes, 1), rtol=1e-5, atol=1e-5)


def test_groups_have_target_models_of_their_own(method_runs) -> None:
    result = method_runs.run("method=dsir", "target.group_field=subtask", f"method.buckets={BUCKETS}")
    for place, group in enumerate(("first", "second")):
        expected, _ = weights(method_runs.pool, method_runs.targets[place::2], BUCKETS, 3000.0)
        expected = np.where(method_runs.scoped() > 0, expected, np.nan)
        np.testing.assert_allclose(result.scores.groups[group], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result.scores.score, np.max(list(result.scores.groups.values()), axis=0))


def test_records_with_few_words_have_no_score_on_request(method_runs) -> None:
    counts = np.array([len(words(record)) for record in method_runs.pool])
    least = int(np.median(counts))
    every = method_runs.run("method=dsir").scores.score
    long = method_runs.run("method=dsir", f"method.min_words={least}").scores.score
    assert (counts == least).any(), "the bound itself must be tried"
    np.testing.assert_array_equal(long, np.where(counts >= least, every, np.nan))


def test_noise_is_a_seeded_draw_by_importance(method_runs) -> None:
    top = method_runs.run("method=dsir").scores.score
    first = method_runs.run("method=dsir", "method.noise=true").scores.score
    again = method_runs.run("method=dsir", "method.noise=true").scores.score
    other = method_runs.run("method=dsir", "method.noise=true", "seed=1").scores.score
    np.testing.assert_array_equal(first, again)
    assert (first != other)[~np.isnan(first)].all()
    noise = first - top
    assert np.nanmin(noise) > -3  # a Gumbel draw below -3 has a probability of 2e-9
    assert 0 < np.nanmean(noise) < 1.2  # mean 0.577, standard error 0.2


def test_neighbours_of_two_records_are_no_pair(method_runs, tmp_path) -> None:
    pool = [
        {"prompt": "red", "response": "green"},
        {"prompt": "blue", "response": ""},
        {"prompt": "", "response": "red"},
    ]
    target = {"prompt": "green", "response": "blue"}
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(record) + "\n" for record in pool))
    (tmp_path / "target.jsonl").write_text(json.dumps(target) + "\n")
    result = method_runs.run("method=dsir", f"pool.path={tmp_path}/pool.jsonl", f"target.path={tmp_path}/target.jsonl")
    expected, _ = weights(pool, [target], 10_000, 3000.0)
    np.testing.assert_allclose(result.scores.score, expected, rtol=1e-5, atol=1e-6)


def test_ratios_become_the_papers_with_more_targets() -> None:
    seen = np.array([10, 30, 60, 0])
    wanted = np.array([50, 30, 20, 0]) * 10**7
    np.testing.assert_allclose(log_ratios(wanted, seen, 300.0)[:3], np.log([5.0, 1.0, 1 / 3]), atol=1e-5)
    # nothing known of the targets: no record is preferred
    np.testing.assert_allclose(log_ratios(np.zeros(4, int), seen, 300.0), 0)


def test_targets_without_text_are_a_user_error(method_runs, tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"prompt": "words", "response": ""}\n')
    with pytest.raises(UserError, match="no word in scope=response"):
        method_runs.run("method=dsir", "scope=response", f"target.path={tmp_path}/empty.jsonl")
