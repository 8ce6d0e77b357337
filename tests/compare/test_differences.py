"""Paired tests between runs: which pairs, on which records, and with what result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import edit

from trim_lightning.compare.differences import Comparison, compare_groups, equal_budgets, pairs_to_test
from trim_lightning.compare.groups import Group, group_runs
from trim_lightning.compare.predictions import read_predictions
from trim_lightning.runs.find import find_runs
from trim_lightning.runs.manifest import BrokenRun
from trim_lightning.runs.run import read_runs


def groups_of(*paths: Path) -> list[Group]:
    """Groups of runs that must all be finished."""
    runs, broken = read_runs(find_runs(paths)[0])
    assert not broken
    return group_runs(runs)


def against_random(groups: list[Group], samples: int = 300, seed: int = 0) -> tuple[list[Comparison], list[str]]:
    """All groups against random."""
    return compare_groups(groups, pairs_to_test(groups, all_pairs=False), samples=samples, seed=seed)


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The predictions of a run."""
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]


def rewrite(run: Path, change: Callable[[int, dict[str, Any]], dict[str, Any] | None]) -> Path:
    """Replace every prediction by what a function gives, None dropping it."""
    lines = [change(place, line) for place, line in enumerate(lines_of(run))]
    (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line is not None))
    return run


def as_trim(run: Path) -> Path:
    """Make a training run that of another method."""
    for name in ("manifest.json", "selection/manifest.json"):
        edit(run, lambda manifest: manifest["config"].update(method={"name": "trim"}), name)
    return run


def test_real_runs_against_plain_python(trained: dict[str, Path]) -> None:
    groups = groups_of(*trained.values())
    comparisons, notes = against_random(groups, samples=200, seed=4)
    assert not notes
    assert [(item.first.method, item.second.method, item.metric) for item in comparisons] == [
        ("longest", "random", metric) for metric in ("nll", "exact_match", "option_accuracy")
    ]
    longest = {line["id"]: line for line in lines_of(trained["longest"])}
    random = [{line["id"]: line for line in lines_of(trained[f"random_{seed}"])} for seed in range(3)]
    ids = sorted(longest)
    drawn = np.random.default_rng(4).integers(0, len(ids), (200, len(ids)))
    for item, field in zip(comparisons, ("nll", "correct", "choice_correct"), strict=True):
        gains = {name: longest[name][field] - sum(part[name][field] for part in random) / 3 for name in ids}
        weight = {name: longest[name]["num_tokens"] if field == "nll" else 1 for name in ids}

        def statistic(names: list[str], gains: dict = gains, weight: dict = weight) -> float:
            return sum(gains[name] for name in names) / sum(weight[name] for name in names)

        resampled = [statistic([ids[place] for place in sample]) for sample in drawn]
        assert item.difference == pytest.approx(statistic(ids))
        assert item.over_records == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])))
        assert (item.runs, item.untested) == ((1, 3), "1 run: too few to tell")
        assert (item.low, item.high, item.p, item.holm, item.verdict) == (None,) * 5
        assert item.records == len(ids) == 14
    numbers = [json.loads((run / "metrics.json").read_text())["eval/nll"] for run in trained.values()]
    assert comparisons[0].difference == pytest.approx(numbers[3] - sum(numbers[:3]) / 3)
    assert comparisons[0].difference != 0


def test_the_same_seed_gives_the_same_result(trained: dict[str, Path]) -> None:
    groups = groups_of(*trained.values())
    first, again, other = (against_random(groups, seed=seed)[0][0] for seed in (1, 1, 2))
    assert first.over_records == again.over_records != other.over_records
    assert first.difference == again.difference == other.difference


def test_identical_predictions_differ_by_nothing(trained: dict[str, Path], variant) -> None:
    copy = as_trim(variant(trained["random_0"], "copy"))
    comparisons, _ = against_random(groups_of(trained["random_0"], copy))
    assert len(comparisons) == 3
    for item in comparisons:
        assert (item.difference, item.over_records, item.verdict) == (0, (0, 0), None)


def test_runs_from_before_a_key_was_there_are_of_the_same_kind(trained: dict[str, Path], variant) -> None:
    def older(manifest: dict) -> None:
        for config in (manifest["config"], manifest["selection"]["config"]):
            del config["fingerprint"], config["saliency"]["error_weight"]

    old = variant(trained["random_0"], "older", older)
    groups = groups_of(trained["random_0"], old)
    assert len({run.settings["fingerprint.token_class"] for group in groups for run in group.runs}) == 1
    assert len(groups) == 1


def test_records_are_matched_by_id_not_by_place(trained: dict[str, Path], variant) -> None:
    copy = as_trim(variant(trained["random_0"], "copy"))
    (copy / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of(copy)[::-1]))
    comparisons, _ = against_random(groups_of(trained["random_0"], copy))
    assert [(item.difference, item.over_records) for item in comparisons] == [(0, (0, 0))] * 3


def test_a_clear_gain_is_found(trained: dict[str, Path], variant) -> None:
    better = rewrite(
        as_trim(variant(trained["random_0"], "better")),
        lambda place, line: line | {"nll": line["nll"] - 0.5 * line["num_tokens"], "correct": True},
    )
    nll, exact, _ = against_random(groups_of(trained["random_0"], better))[0]
    assert nll.difference == pytest.approx(-0.5)
    assert nll.over_records == pytest.approx((-0.5, -0.5))
    assert nll.verdict is None  # one run of each, however clear it looks
    assert exact.difference == 1 - sum(line["correct"] for line in lines_of(trained["random_0"])) / 14


def scattered(
    run: Path, variant: Callable[..., Path], name: str, seed: int, shift: float, *, draws: bool = True
) -> Path:
    """A copy with another selection or training seed, and with losses of its own."""
    copy = variant(run, name)
    for file in ("manifest.json", *(("selection/manifest.json",) if draws else ())):
        key = {"seed": seed} if draws else {"train": json.loads((copy / file).read_text())["config"]["train"]}
        key.get("train", {}).update(seed=seed)
        edit(copy, lambda manifest, key=key: manifest["config"].update(key), file)
    chance = np.random.default_rng(seed).normal(0, 0.01, 15)
    return rewrite(
        copy,
        lambda place, line: line | {"nll": line["nll"] + (shift + chance[14] + chance[place]) * line["num_tokens"]},
    )


def test_five_runs_of_each_have_a_verdict(trained: dict[str, Path], variant) -> None:
    random = [scattered(trained["random_0"], variant, f"r{seed}", seed, 0.0) for seed in range(5)]
    equal = [as_trim(scattered(trained["random_0"], variant, f"e{seed}", 10 + seed, 0.0)) for seed in range(5)]
    (nll, exact, _), notes = against_random(groups_of(*random, *equal))
    assert not notes
    assert (nll.runs, nll.verdict, nll.untested) == ((5, 5), "not told apart", "")
    assert nll.low < 0 < nll.high
    assert (exact.verdict, exact.untested) == (None, "nothing varies: no test")  # right and wrong were left alone
    for shift, verdict in ((-0.3, "better"), (0.3, "worse")):
        other = [
            as_trim(scattered(trained["random_0"], variant, f"{verdict}{seed}", 20 + seed, shift)) for seed in range(5)
        ]
        nll = against_random(groups_of(*random, *other))[0][0]
        assert (nll.verdict, nll.p) == (verdict, nll.holm)
        assert nll.p < 0.001
        # one run fewer, and nothing is said
        nll = against_random(groups_of(*random, *other[:4]))[0][0]
        assert (nll.verdict, nll.p, nll.low, nll.untested) == (None, None, None, "4 runs: too few to tell")


def test_several_tests_of_a_metric_are_corrected(trained: dict[str, Path], variant) -> None:
    runs = [scattered(trained["random_0"], variant, f"r{seed}", seed, 0.0) for seed in range(5)]
    for place, shift in enumerate((-0.016, -0.3, 0.3)):
        for seed in range(5):
            run = scattered(trained["random_0"], variant, f"{place}_{seed}", 10 * place + 10 + seed, shift)
            for name in ("manifest.json", "selection/manifest.json"):
                edit(run, lambda m, place=place: m["config"].update(method={"name": f"m{place}"}), name)
            runs.append(run)
    found = [item for item in against_random(groups_of(*runs))[0] if item.metric == "nll"]
    plain = sorted(item.p for item in found)
    corrected = [min(1, max(p * (3 - place) for place, p in enumerate(plain[: last + 1]))) for last in range(3)]
    assert sorted(item.holm for item in found) == pytest.approx(corrected)
    assert [item.verdict for item in found[1:]] == ["better", "worse"]


def test_repetitions_are_one_run(trained: dict[str, Path], variant) -> None:
    random = [scattered(trained["random_0"], variant, f"r{seed}", seed, 0.0) for seed in range(5)]
    same = [as_trim(scattered(trained["longest"], variant, f"s{seed}", 3, 0.0)) for seed in range(5)]
    for seed, run in enumerate(same):  # the training seed differs, the result does not
        edit(run, lambda manifest, seed=seed: manifest["config"]["train"].update(seed=seed))
    (nll, *_), notes = against_random(groups_of(*random, *same))
    assert (nll.runs, nll.verdict, nll.untested) == ((1, 5), None, "1 run: too few to tell")
    assert nll.difference == pytest.approx(against_random(groups_of(*random, same[0]))[0][0].difference)
    (note,) = notes
    assert note.startswith("trim (B): its 5 runs count as 1 in tests")


def test_trainings_on_one_draw_of_random_are_one_run(trained: dict[str, Path], variant) -> None:
    """On a coreset that has no chance in it they are runs of their own."""
    one_draw = [scattered(trained["random_0"], variant, f"r{seed}", seed, 0.0, draws=False) for seed in range(5)]
    chosen = [as_trim(scattered(trained["longest"], variant, f"t{seed}", seed, 0.0, draws=False)) for seed in range(5)]
    (nll, *_), notes = against_random(groups_of(*one_draw, *chosen))
    assert (nll.runs, nll.untested) == ((5, 1), "1 run: too few to tell")
    (note,) = notes
    assert note.startswith("random (A): its 5 runs count as 1")
    # a method whose coresets differ draws as well: three trainings on either of two coresets are two runs
    for place, run in enumerate(chosen):
        if place > 2:
            edit(run, lambda manifest: manifest["config"].update(seed=1))
            edit(run, lambda manifest: manifest["config"].update(seed=1), "selection/manifest.json")
            with (run / "selection" / "coreset.jsonl").open("a") as file:
                file.write("\n")
    assert against_random(groups_of(*one_draw, *chosen))[0][0].runs == (2, 1)


def test_a_metric_of_one_run_alone_is_not_tested(trained: dict[str, Path], variant) -> None:
    copy = rewrite(
        variant(trained["longest"], "copy"),
        lambda place, line: {name: value for name, value in line.items() if not name.startswith("choice")},
    )
    comparisons, notes = against_random(groups_of(trained["random_0"], copy))
    assert [item.metric for item in comparisons] == ["nll", "exact_match"]
    assert not notes


def test_a_metric_of_some_records_counts_those(trained: dict[str, Path], variant) -> None:
    def half(place: int, line: dict[str, Any]) -> dict[str, Any]:
        return line if place % 2 else {name: value for name, value in line.items() if "correct" not in name}

    runs = [rewrite(variant(trained[name], name), half) for name in ("random_0", "longest")]
    comparisons, _ = against_random(groups_of(*runs))
    assert [(item.metric, item.records) for item in comparisons] == [
        ("nll", 14), ("exact_match", 7), ("option_accuracy", 7)
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["another file", "other records", "fewer records"])
def test_other_held_out_records_cannot_be_paired(trained: dict[str, Path], variant, how: str) -> None:
    copy = variant(trained["longest"], "copy")
    if how == "another file":  # whose ids may well be the same
        edit(copy, lambda manifest: manifest["inputs"]["evaluation"].update(sha256="0" * 64))
    elif how == "other records":
        rewrite(copy, lambda place, line: line | {"id": f"x{place}"})
    else:
        rewrite(copy, lambda place, line: line if place else None)
    comparisons, notes = against_random(groups_of(trained["random_0"], copy))
    assert not comparisons
    assert notes == ["longest (B) and random (A) cannot be paired: they were evaluated on different held-out records"]


def test_another_tokenizer_forbids_the_loss_alone(trained: dict[str, Path], variant) -> None:
    copy = rewrite(
        variant(trained["longest"], "copy"), lambda place, line: line | {"num_tokens": line["num_tokens"] + 1}
    )
    comparisons, notes = against_random(groups_of(trained["random_0"], copy))
    assert [item.metric for item in comparisons] == ["exact_match", "option_accuracy"]
    (note,) = notes
    assert "by nll" in note
    assert "tokenizers" in note


def test_a_diverged_run_is_noted(trained: dict[str, Path], variant) -> None:
    copy = rewrite(variant(trained["longest"], "copy"), lambda place, line: line | {"nll": float("inf")})
    comparisons, notes = against_random(groups_of(trained["random_0"], copy))
    assert [item.metric for item in comparisons] == ["exact_match", "option_accuracy"]
    assert notes == ["longest (B) is in no test of nll: some of its values are not finite"]


def test_missing_or_damaged_predictions_are_noted(trained: dict[str, Path], variant) -> None:
    missing, damaged = variant(trained["longest"], "missing"), variant(trained["longest"], "damaged")
    (missing / "predictions.jsonl").unlink()
    (damaged / "predictions.jsonl").write_text('{"id": "r0"}\n{"id"\n')
    for run, words in ((missing, "is missing"), (damaged, "line 2 is not a prediction")):
        comparisons, notes = against_random(groups_of(trained["random_0"], run))
        assert not comparisons
        (note,) = notes
        assert words in note
        assert run.name in note
    with pytest.raises(BrokenRun, match="line 2"):
        read_predictions(damaged / "predictions.jsonl")


def test_repeated_ids_are_told_apart(tmp_path: Path) -> None:
    lines = [{"id": "a", "num_tokens": 1, "nll": 5.0}, {"id": "b", "num_tokens": 2, "nll": 6.0},
             {"id": "a", "num_tokens": 3, "nll": 7.0, "correct": None}]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = read_predictions(tmp_path / "p.jsonl")
    assert found.ids == (("a", 0), ("a", 1), ("b", 0))
    assert found.values["nll"].tolist() == [5, 7, 6]
    assert set(found.values) == {"nll"}


@pytest.mark.parametrize(
    ("records", "tokens", "responses", "expected"),
    [
        (4, 1020, 300, "records and tokens"),
        (4, 1021, 300, "records"),
        (5, 1020, 300, "tokens"),
        (5, 980, 300, "tokens"),
        (5, 979, 300, "neither"),
        (5, 979, 392, "response tokens"),
        (5, 979, 391, "neither"),
        (4, 1000, 400, "records and tokens and response tokens"),
        (5, 1000, None, "tokens"),
        (4, None, None, "records"),
        (5, None, 400, "response tokens"),
    ],
)
def test_equal_budgets(records: int, tokens: int | None, responses: int | None, expected: str) -> None:
    class Fake:
        def __init__(self, records: float, tokens: float | None, responses: float | None) -> None:
            self.records, self.tokens, self.response_tokens = records, tokens, responses

    assert equal_budgets(Fake(4, 1000, 400), Fake(records, tokens, responses)) == expected
    assert equal_budgets(Fake(records, tokens, responses), Fake(4, 1000, 400)) == expected
    unknown = Fake(4, None, None)
    assert equal_budgets(unknown, Fake(records, tokens, responses)) == ("records" if records == 4 else "neither")


def test_the_baseline_is_the_random_of_equal_budget(made_runs, trained: dict[str, Path], tmp_path: Path) -> None:
    tokens = json.loads((trained["longest"] / "metrics.json").read_text())["selection/tokens"]
    equal_tokens = made_runs.train(tmp_path / "tokens", "method=random", f"selection.tokens={tokens + 40}")
    larger = made_runs.train(tmp_path / "larger", "method=random", "selection.count=12")
    groups = groups_of(trained["longest"], trained["random_0"], equal_tokens, larger)
    against = [second.first.budget for _, second in pairs_to_test(groups, all_pairs=False)]
    kept = [equal_budgets(groups[0], group) for group in groups[1:]]
    assert kept[0] == "records"
    assert kept[2] == "neither"
    assert against == [group.first.budget for group, equal in zip(groups[1:], kept, strict=True) if equal != "neither"]
    # with nothing of equal budget, what there is has to do, and the table says so
    groups = groups_of(trained["longest"], larger)
    assert [second.first.budget for _, second in pairs_to_test(groups, all_pairs=False)] == ["12 records"]


def test_the_baseline_shares_the_training(trained: dict[str, Path], variant) -> None:
    def more_epochs(manifest: dict[str, Any]) -> None:
        manifest["config"]["train"]["epochs"] = 5

    longer = [variant(trained[name], f"long_{name}", more_epochs) for name in ("longest", "random_0")]
    groups = groups_of(trained["longest"], trained["random_0"], *longer)
    pairs = [(first.name, second.name) for first, second in pairs_to_test(groups, all_pairs=False)]
    assert pairs == [("A", "B"), ("C", "D")]


def test_the_same_trainee_comes_before_an_equal_budget(made_runs, trained, variant, tmp_path: Path) -> None:
    other_model = variant(trained["random_0"], "other", lambda m: m["config"]["train"].update(model="models/other"))
    larger = made_runs.train(tmp_path / "larger", "method=random", "selection.count=9")
    groups = groups_of(trained["longest"], other_model, larger)
    assert [second.name for _, second in pairs_to_test(groups, all_pairs=False)] == ["C"]


def test_all_pairs(trained: dict[str, Path], selections: dict[str, Path], variant) -> None:
    other = as_trim(variant(trained["longest"], "other"))
    groups = groups_of(trained["random_0"], trained["longest"], other, selections["trim"])
    pairs = [(first.method, second.method) for first, second in pairs_to_test(groups, all_pairs=True)]
    assert pairs == [("longest", "random"), ("trim", "random"), ("longest", "trim")]
