"""The instrument that tells what records teach: its groups, its figures, its formulas."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import PreTrainedModel

from trim_lightning.engine.response_loss import mean_response_loss, response_counts
from trim_lightning.tokens.spans import PROMPT, RESPONSE
from trim_lightning.tokens.tokenized import TokenizedRecords

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import value_aggregates
import value_bins
import value_candidates
import value_drops
import value_figures
import value_groups
import value_lengths
import value_methods
import value_page
import value_rule
import value_scores
from value_features import ResponseTokens, errors
from value_gains import Gains, collect, restore, wanted
from value_groups import Group

GROUPS = 60


def table(seed: int, tasks: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(GROUPS, tasks))


def test_groups_fill_up_to_the_same_response_tokens_and_clusters_hold_like_records() -> None:
    generator = np.random.default_rng(0)
    subjects = [[f"{kind}{number}" for number in range(50)] for kind in ("fruit", "engine", "violin")]
    texts, kinds = [], []
    for number in range(900):
        words = subjects[number % 3]
        texts.append(" ".join(generator.choice(words, 12)))
        kinds.append(number % 3)
    response, tokens = np.full(900, 100), np.full(900, 150)
    groups = value_groups.make_groups(texts, response, tokens)
    assert {group.kind for group in groups} == {"cluster", "mixture"}
    for group in groups:
        assert len(set(group.rows)) == len(group.rows)
        assert value_groups.RESPONSE_TOKENS <= group.response_tokens < value_groups.RESPONSE_TOKENS + 100
        found = {kinds[row] for row in group.rows}
        assert len(found) == (1 if group.kind == "cluster" else 3)
    assert groups == value_groups.make_groups(texts, response, tokens)


def test_records_that_cost_too_much_for_their_responses_fill_no_group() -> None:
    members = np.arange(5_000)
    assert value_groups.fill(members, np.full(5_000, 1), np.full(5_000, 100)) == []
    assert len(value_groups.fill(members, np.full(5_000, 10), np.full(5_000, 60))) == 20


def test_an_answer_is_the_option_and_not_its_letter() -> None:
    asked = {"prompt": "?", "response": "The answer is (B).", "answer": "B", "choices": ["one", "two"]}
    assert value_groups.free_text(asked)["response"] == "two"
    assert value_groups.free_text({"prompt": "?", "response": "So 4.", "answer": "4"})["response"] == "So 4."


def test_spearman_is_scipys_column_by_column() -> None:
    first, second = table(0), table(0) + table(1)
    second[:5] = second[5:10]  # ties
    expected = [stats.spearmanr(first[:, task], second[:, task]).statistic for task in range(5)]
    assert value_figures.spearman(first, second) == pytest.approx(expected)
    assert (value_figures.spearman(np.ones((GROUPS, 5)), second) == 0).all()


def test_scores_that_know_nothing_give_nothing_and_the_gain_itself_gives_one() -> None:
    gains = table(2)
    values = [value_figures.correlation(table(seed), gains, samples=1).value for seed in range(3, 23)]
    assert abs(np.mean(values)) < 0.05
    assert value_figures.correlation(gains, gains).value == pytest.approx(1)


def test_an_interval_covers_chance_about_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(40):
        figure = value_figures.correlation(table(100 + seed), table(200 + seed), seed, samples=200)
        inside += figure.low <= 0 <= figure.high
    assert inside >= 34


def test_the_special_part_of_a_gain_is_free_of_what_is_common_to_all_tasks() -> None:
    common = np.random.default_rng(0).normal(size=(GROUPS, 1))
    own = table(3)
    special = value_figures.special((10 * common + own) * np.array([1, 2, 3, 4, 5]))
    assert special.mean(1) == pytest.approx(np.zeros(GROUPS), abs=1e-9)
    assert (abs(value_figures.spearman(special, np.repeat(common, 5, 1))) < 0.35).all()
    assert (value_figures.spearman(special, own - own.mean(1, keepdims=True)) > 0.9).all()


def test_the_ceiling_is_the_root_of_the_agreement_of_two_seeds() -> None:
    truth, noise = table(5), 0.5
    first, second = truth + noise * table(6), truth + noise * table(7)
    names = tuple(map(str, range(GROUPS)))
    gains = Gains(names, value_groups.TASKS, first, second)
    measured = value_figures.spearman(truth, first).mean()
    assert value_figures.ceiling(gains, "gain").mean() == pytest.approx(measured, abs=0.05)
    assert gains.mean == pytest.approx((first + second) / 2)


def test_what_half_of_the_trainings_tell_is_gathered_as_it_is(tmp_path: Path) -> None:
    groups = [Group(f"{number}", "cluster" if number < 40 else "mixture", (number,), 1, 1) for number in range(GROUPS)]
    order = wanted(groups)
    assert sorted(group.name for group, seed in order if seed == 0) == sorted(group.name for group in groups)
    assert sum(seed for _, seed in order) == GROUPS / 3
    half = order[: len(order) // 2]
    assert {group.kind for group, _ in half} == {"cluster", "mixture"}
    assert any(seed for _, seed in half)
    (tmp_path / "runs").mkdir()
    losses = dict.fromkeys(value_groups.TASKS, 2.0)
    (tmp_path / "runs" / "before.json").write_text(json.dumps(losses))
    with pytest.raises(SystemExit, match="the fewest"):
        collect(tmp_path, groups, tmp_path / "gains.json")
    for group, seed in half:
        after = {task: value - 0.01 * int(group.name) for task, value in losses.items()}
        (tmp_path / "runs" / f"{group.name}.{seed}.json").write_text(json.dumps({"losses": after}))
    collect(tmp_path, groups, tmp_path / "gains.json")
    gains = Gains.read(tmp_path / "gains.json")
    done = sorted({int(group.name) for group, seed in half if seed == 0})
    assert gains.measured.tolist() == done
    assert gains.take(gains.measured).first[:, 0] == pytest.approx(np.array(done) / 100)


def test_for_value_is_the_alignment_of_a_last_layers_gradients() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 6)
    pool_states, target_states = torch.randn(5, 6), torch.randn(3, 6)
    pool_next, target_next = torch.tensor([1, 2, 3, 39, 0]), torch.tensor([2, 5, 2])

    def gradient(states: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        layer = weight.clone().requires_grad_()
        torch.nn.functional.cross_entropy(states @ layer.T, following, reduction="sum").backward()
        return layer.grad.flatten()

    wanted_direction = gradient(target_states, target_next)
    expected = [gradient(pool_states[a:b], pool_next[a:b]) @ wanted_direction for a, b in ((0, 2), (2, 2), (2, 5))]
    found = value_candidates.head_alignment(
        pool_states, pool_next, np.array([0, 2, 2, 5]), target_states, target_next, weight
    )
    assert found == pytest.approx(np.array([float(value) for value in expected]), rel=1e-4)


def units(*rows: list[float]) -> np.ndarray:
    made = np.array(rows, dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_cosines_with_single_targets_become_one_score() -> None:
    vectors = units([1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.2, 1], [0, 0, 0.5])
    cosines = (vectors @ units([1, 0, 0], [0, 1, 0]).T).astype(float)
    cosines[4] = np.nan  # has no response
    for how in value_aggregates.AGGREGATES:
        scores = value_aggregates.aggregate(cosines, vectors, how)
        assert np.isnan(scores).tolist() == [False] * 4 + [True]
        assert scores[3] <= scores[:3].min()
    assert value_aggregates.aggregate(cosines, vectors, "max")[:3] == pytest.approx([1, 0.9939, 1], abs=1e-3)
    assert value_aggregates.aggregate(cosines, vectors, "turns")[:4].tolist() == [1, 1 / 2, 1, 1 / 2]


def test_records_that_crowd_share_what_a_target_gives() -> None:
    apart = np.random.default_rng(3).normal(size=(40, 200)).astype(np.float32)
    apart[0, 0] = apart[1, 0] = 40  # the two nearest, at right angles but for the target's own axis
    apart[2] = apart[1]  # a double
    vectors = units(*apart.tolist())
    target = units([1.0] + [0.0] * 199)
    mass = value_aggregates.nearest_by_density((vectors @ target.T).astype(float), vectors)
    assert mass.sum() == pytest.approx(1)
    assert (mass > 0).sum() == 4
    assert mass[1] == mass[2] < mass[0]


def test_transport_gives_all_that_targets_have_to_what_is_near() -> None:
    pytest.importorskip("ot")
    vectors = units(*np.random.default_rng(4).normal(size=(300, 8)).tolist())
    targets = units(*np.random.default_rng(5).normal(size=(6, 8)).tolist())
    mass = value_aggregates.transport((vectors @ targets.T).astype(float))
    assert mass.sum() == pytest.approx(1, abs=1e-3)
    nearest = (vectors @ targets.T).max(1)
    assert stats.spearmanr(mass, nearest).statistic > 0.8


def test_mean_states_are_of_each_records_tokens() -> None:
    states = torch.arange(12.0).reshape(6, 2)
    empty = np.zeros(0, dtype=np.float32)
    tokens = ResponseTokens(np.array([0, 2, 2, 6]), empty, empty, empty, empty, empty, empty)
    found = value_candidates.mean_states(tokens, states)
    assert found.tolist() == [[1, 2], [0, 0], [7, 8]]


def test_the_best_decile_is_of_the_groups_with_the_highest_scores() -> None:
    gains = np.arange(GROUPS, dtype=float)[:, None].repeat(5, 1)
    assert value_figures.best_decile(gains, gains) == pytest.approx(np.full(5, 56.5 - 29.5))
    assert value_figures.best_decile(-gains, gains) == pytest.approx(np.full(5, 2.5 - 29.5))


def test_a_group_scores_the_mean_of_its_scored_records() -> None:
    scores = np.array([[1.0, 3.0, np.nan, 8.0]])
    groups = [Group("a", "cluster", (0, 1, 2), 1, 1), Group("b", "cluster", (3,), 1, 1)]
    assert value_scores.group_scores(scores, groups).tolist() == [[2.0], [8.0]]


def test_errors_are_the_gradient_of_the_loss_towards_the_last_state() -> None:
    torch.manual_seed(0)
    weight, following = torch.randn(50, 8), torch.tensor([3, 49, 7])
    states = torch.randn(3, 8, requires_grad=True)
    torch.nn.functional.cross_entropy(states @ weight.T, following, reduction="sum").backward()
    gradient, probability = errors(states.detach(), following, weight)
    assert torch.allclose(gradient, -states.grad, atol=1e-5)
    assert torch.allclose(probability, torch.softmax(states @ weight.T, -1)[range(3), following], atol=1e-6)


def response_tokens(lengths: list[int], vocabulary: int = 50, hidden: int = 32, seed: int = 0) -> ResponseTokens:
    generator = np.random.default_rng(seed)
    number = sum(lengths)
    states = [generator.normal(size=(number, hidden)).astype(np.float16) for _ in range(3)]
    return ResponseTokens(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        token_ids=generator.integers(vocabulary, size=number),
        predicting=states[0],
        own=states[1],
        gradient=states[2],
        probability=generator.uniform(0.01, 1, number).astype(np.float32),
        attention=generator.uniform(0.01, 1, number).astype(np.float32),
    )


def test_a_sketch_keeps_the_cosine_of_last_layer_gradients() -> None:
    tokens = response_tokens([5, 9, 5, 7], seed=1)
    doubled = tokens.take(np.array([0, 1, 2, 3, 0]))  # the last is the first once more
    states, gradients = (torch.from_numpy(part.astype(np.float32)) for part in (doubled.predicting, doubled.gradient))
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(32, 400, generator=generator) / 20 for _ in range(2)]
    found = value_candidates.sketch(doubled, states, gradients, (wide[0], wide[1]))
    exact = torch.stack([
        torch.einsum("kh,kg->hg", states[start:end], gradients[start:end]).flatten()
        for start, end in zip(doubled.offsets[:-1], doubled.offsets[1:], strict=True)
    ])  # fmt: skip
    exact = torch.nn.functional.normalize(exact, dim=-1)
    assert torch.allclose(found @ found.T, exact @ exact.T, atol=0.15)
    assert float(found[0] @ found[4]) == pytest.approx(1, abs=1e-5)


def test_every_candidate_scores_records_with_a_response_and_no_other_and_prefers_the_targets_themselves() -> None:
    tokens = response_tokens([6, 0, 8, 12, 7, 9, 10, 11])
    targets = tokens.take(np.array([0, 2]))
    embeddings = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    candidates = value_candidates.Pass(tokens, embeddings)
    skipped = {"loss", "response length", "trim, responses, mean times log length"}  # know no targets, or like length
    names = [name for name, _ in value_candidates.named()]
    assert len(names) == len(set(names))
    for name, formula in value_candidates.named():
        if "whitened" in name:  # wider than these states
            continue
        scores = formula(candidates, targets)
        assert np.isnan(scores).tolist() == [False, True] + [False] * 6, name
        if name not in skipped:
            assert {int(row) for row in np.argsort(-np.nan_to_num(scores, nan=-9))[:2]} == {0, 2}, name


def test_losses_of_records_sum_up_to_the_mean_loss(
    tiny_model: Callable[[str], PreTrainedModel], tokenized: Callable[..., TokenizedRecords]
) -> None:
    generator = np.random.default_rng(3)
    made = [(generator.integers(5, 60, size).tolist(), [PROMPT] * prompt + [RESPONSE] * (size - prompt))
            for size, prompt in ((12, 4), (30, 3), (7, 7), (18, 9))]  # fmt: skip
    records, model = tokenized(made), tiny_model("llama")
    found = value_drops.losses(model, records)
    assert np.isnan(found).tolist() == [False, False, True, False]
    counts = response_counts(records)
    assert np.nansum(found * counts) / counts.sum() == pytest.approx(mean_response_loss(model, records, 50), rel=1e-5)


def test_scores_come_back_with_what_they_cost(tmp_path: Path) -> None:
    selection = tmp_path / "run"
    selection.mkdir()
    stages = {
        "tokenize": {"seconds": 9.0, "tokens": 1000}, "fingerprint": {"seconds": 1.0, "tokens": 50},
        "score": {"seconds": 4.0, "tokens": 1000}, "select": {"seconds": 7.0, "tokens": 0},
    }  # fmt: skip
    (selection / "manifest.json").write_text(json.dumps({"stages": stages}))
    cost = value_methods.cost_of(selection, timed=True)
    assert cost == value_methods.Cost(5.0, 1.05, 1000)
    scores = np.arange(6.0).reshape(2, 3)
    value_methods.keep(value_methods.scores_file(tmp_path, "trim"), scores, cost, "trim-select method=trim")
    (found,) = value_methods.kept(tmp_path).values()
    assert (found.scores.tolist(), found.cost, found.command) == (scores.tolist(), cost, "trim-select method=trim")
    scored = {"trim": found, "less": replace(found, cost=replace(cost, seconds=10.0)),
              "rds": replace(found, cost=replace(cost, seconds=float("nan")))}  # fmt: skip
    groups = [Group("a", "cluster", (0, 1), 1, 1)]
    made = value_scores.of_groups(scored, groups)
    lines = value_page.cost_table(made).splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["1.00", "2.00", ""]
    before = {name: replace(scores, time=7.0) for name, scores in made.items()}
    assert [scores.time for scores in value_scores.renewed(before, made).values()] == [1.0, 2.0, 7.0]


def test_what_is_kept_of_scores_judges_as_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [Group(str(number), "cluster", tuple(range(12 * number, 12 * number + 12)), 1, 1) for number in range(9)]
    monkeypatch.setattr(value_methods, "FEW_GROUPS", 5)
    sampled = [place for place, group in enumerate(groups) if group in value_methods.few(groups)]
    assert len(sampled) == 5
    scores = np.random.default_rng(2).normal(size=(5, 108))
    some = np.where(np.arange(108) % 12 < 7, scores, np.nan)  # all groups share records with those that were sampled
    cost = value_methods.Cost(3.0, 1.02, 500)
    scored = {
        "trim": value_methods.Scored(scores, cost, "trim-select method=trim"),
        "less": value_methods.Scored(some, replace(cost, seconds=float("nan")), "trim-select method=less"),
    }
    path = tmp_path / "scores.parquet"
    assert value_scores.read_scores(groups, path) == {}
    value_scores.write_scores(value_scores.of_groups(scored, groups), groups, path)
    found = value_scores.read_scores(groups, path)
    assert list(found) == ["trim", "less"]
    expected = scores.reshape(5, 9, 12).mean(2).T
    assert found["trim"].means == pytest.approx(expected, abs=1e-6)
    assert (found["trim"].passes, found["trim"].time, found["trim"].command) == (1.02, 1.0, "trim-select method=trim")
    assert found["less"].means[sampled] == pytest.approx(np.nanmean(some.reshape(5, 9, 12), 2).T[sampled], abs=1e-6)
    assert np.isnan(np.delete(found["less"].means, sampled, 0)).all()
    assert np.isnan(found["less"].time)


def test_sums_add_what_methods_say_of_the_groups() -> None:
    one, two = table(0), 100 * table(1) + 7
    found = value_page.sums({"trim": one, "less": two, "rds": two})
    assert list(found) == ["trim + less"]
    whole = found["trim + less"]
    expected = stats.zscore(one) + stats.zscore(two)
    assert whole == pytest.approx(expected)


def test_lengths_of_what_is_put_first() -> None:
    tokens = np.arange(100)
    scores = np.stack([np.where(np.arange(100) < 41, np.arange(100.0), np.nan)] * 5)
    found = value_lengths.lengths_table({"one": value_methods.Scored(scores, value_methods.Cost(1, 1, 1), "")}, tokens)
    cells = [cell.strip() for cell in found.splitlines()[-1].strip("|").split("|")]
    assert cells == ["one", *["40"] * 5, "20"], "of 41 the two longest, 39.5, and the middle of all"


def test_a_score_is_held_against_the_plain_methods_on_the_reporting_tasks() -> None:
    generator = np.random.default_rng(0)
    gains = generator.normal(size=(60, 5))
    noise = {name: generator.normal(size=(60, 5)) for name in ("trim", "rds", "bm25")}
    found = value_rule.rule_table({**noise, "trim_plus": gains, "trim_plus: alignment": -gains}, gains, samples=200)
    best, worst = ([cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()[2:])
    assert best[:2] == ["trim_plus", "+1.00"]
    assert best[-1] == "none"
    assert best[5] == "+1.00 (+1.00 to +1.00)", "random scores have 0"
    assert worst[:2] == ["trim_plus: alignment", "-1.00"]
    reporting = ("svamp", "bbh", "mmlu")
    rivals = (*value_rule.PLAIN, "random")
    assert worst[-1].split(", ") == [f"{task} ({rival})" for task in reporting for rival in rivals]


def test_methods_are_judged_where_the_costly_ones_are_too(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [Group(str(number), "cluster", (number,), 1, 1) for number in range(30)]
    monkeypatch.setattr(value_methods, "FEW_GROUPS", 19)
    first = [int(group.name) for group, seed in wanted(groups) if seed == 0]
    assert value_page.judged(np.sort(first[:20]), groups).tolist() == sorted(first[:19])
    assert value_page.judged(np.sort(first[:25]), groups).tolist() == sorted(first[:25])
    assert value_page.judged(np.sort(first[:9]), groups).tolist() == sorted(first[:9])


def test_kept_gains_stand_for_trainings_of_another_machine(tmp_path: Path) -> None:
    groups = [Group(str(number), "cluster", (number,), 1, 1) for number in range(30)]
    before = {task: 2.0 + place for place, task in enumerate(value_groups.TASKS)}
    runs = tmp_path / "one" / "runs"
    runs.mkdir(parents=True)
    (runs / "before.json").write_text(json.dumps(before))
    done = wanted(groups)[:25]
    for group, seed in done:
        after = {task: loss - 0.01 * int(group.name) - seed for task, loss in before.items()}
        (runs / f"{group.name}.{seed}.json").write_text(json.dumps({"losses": after}))
    collect(tmp_path / "one", groups, tmp_path / "gains.json")
    other = tmp_path / "two" / "runs"  # another machine rounds otherwise
    other.mkdir(parents=True)
    (other / "before.json").write_text(json.dumps({task: loss + 0.125 for task, loss in before.items()}))
    restore(tmp_path / "two", groups, tmp_path / "gains.json")
    assert sorted(file.name for file in (tmp_path / "two" / "runs").iterdir()) == sorted(
        ["before.json", *(f"{group.name}.{seed}.json" for group, seed in done)]
    )
    own = tmp_path / "two" / "runs" / f"{done[0][0].name}.{done[0][1]}.json"
    own.write_text(json.dumps({"losses": before}))  # what this machine has done itself stays
    restore(tmp_path / "two", groups, tmp_path / "gains.json")
    assert json.loads(own.read_text()) == {"losses": before}
    own.unlink()
    restore(tmp_path / "two", groups, tmp_path / "gains.json")
    collect(tmp_path / "two", groups, tmp_path / "again.json")
    first, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("gains", "again"))
    assert (again["first"], again["second"]) == (first["first"], first["second"])
    (tmp_path / "gains.json").write_text(json.dumps({**first, "training": {"steps": 3}}))
    with pytest.raises(SystemExit, match="other groups or trainings"):
        restore(tmp_path / "two", groups, tmp_path / "gains.json")


def test_methods_are_compared_on_the_same_draws() -> None:
    gains, noise = table(0), table(1)
    tables = {"poor": gains + 4 * noise, "good": gains + noise, "twin": 2 * (gains + noise)}
    found = value_figures.correlations(tables, gains, "good", samples=300)
    alone = value_figures.correlation(tables["poor"], gains, samples=300)
    assert str(found["poor"][0]) == str(alone)
    assert (found["poor"][1].high < 0, found["twin"][1].low, found["twin"][1].high) == (True, 0, 0)
    assert found["poor"][1].value == pytest.approx(found["poor"][0].value - found["good"][0].value)


def test_bins_are_tenths_of_the_scores_with_the_response_tokens_of_a_group() -> None:
    generator = np.random.default_rng(4)
    scores = generator.normal(size=3_000)
    scores[::7] = np.nan
    counts, lengths = np.full(3_000, 100), np.full(3_000, 150)
    lengths[np.nanargmax(scores)] = 5_000  # too long for any group
    groups = value_bins.cut(scores, counts, lengths, "bin")
    assert [group.name for group in groups] == [f"bin-{place}" for place in range(10)]
    bounds = [(scores[list(group.rows)].min(), scores[list(group.rows)].max()) for group in groups]
    assert all(lower[1] < higher[0] for lower, higher in itertools.pairwise(bounds))
    assert {group.response_tokens for group in groups} == {value_groups.RESPONSE_TOKENS}


def test_the_bins_that_there_are_are_told(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "before.json").write_text(json.dumps({"gsm8k": 2.0}))
    groups = [Group(f"bin-trim-gsm8k-{place}", "bin", (place,), 1, 1) for place in (0, 2, 5, 7, 9)]
    for place, group in enumerate(groups):
        (tmp_path / "runs" / f"{group.name}.0.json").write_text(json.dumps({"losses": {"gsm8k": 2 - place / 10}}))
    gains = value_bins.gains_of(tmp_path, [*groups, Group("bin-trim-gsm8k-8", "bin", (), 1, 1)], "gsm8k")
    assert gains == [0.0, None, 0.1, None, None, 0.2, None, 0.3, None, 0.4]
    path = tmp_path / "bins.json"
    path.write_text(json.dumps({"trim": {"gsm8k": gains, "svamp": [0.1] + [None] * 9}}))
    (line,) = value_bins.bins_table(path).splitlines()[2:]
    assert [cell.strip() for cell in line.strip("|").split("|")][:4] == ["trim", "gsm8k", "+1.00", "+0.000"]
