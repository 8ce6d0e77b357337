"""Records without a response: left out before a training, told of in a selection, never taken in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from composing import compose_train
from running import run_train, selection, unwrapped
from tiny_models import write_records
from training.conftest import TrainingFiles, write_lines
from trim_lightning.errors import UserError
from trim_lightning.pipeline.train import Training
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.sweep.plan import plan_jobs
from trim_lightning.sweep.sharing import share_passes

LONG = "whisk butter with sugar, fold flour gently, bake until golden brown; " * 12


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A pool in which the likest record is cut off before its response, others have none, one is cut partway."""
    good = write_records(tmp_path / "pool.jsonl", 6, seed=5, edge_cases=False, response_words=(3, 5))
    pool = [
        *good,
        {"id": "cut", "prompt": LONG, "response": "never seen"},
        {"id": "empty", "prompt": "whisk butter", "response": ""},
        {"id": "blank", "prompt": "bake sugar", "response": " \n"},  # white space is tokens too
        {"id": "partway", "prompt": "fold flour", "response": LONG},
        {"id": "nothing", "prompt": "", "response": ""},
    ]
    write_lines(tmp_path / "pool.jsonl", pool)
    write_lines(tmp_path / "targets.jsonl", [{"prompt": LONG[:200], "response": "bake until golden brown"}])
    return [
        "pool=jsonl", f"pool.path={tmp_path / 'pool.jsonl'}", "target=jsonl",
        f"target.path={tmp_path / 'targets.jsonl'}", "max_length=80", "warmup=none", "saliency.num_layers=2",
    ]  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_selection_says_how_many_teach_nothing(
    training_files: TrainingFiles, files: list[str], tmp_path: Path
) -> None:
    run = selection(
        *training_files.model, *files, "selection.count=10", output_dir=tmp_path / "run", store_dir=training_files.store
    )
    counts = run.manifest["counts"]
    assert {name: counts[name] for name in ("no_response", "response_cut_off", "selected_no_response")} == {
        "no_response": 3,
        "response_cut_off": 1,
        "selected_no_response": 2,
    }
    (line,) = [line for line in run.manifest["warnings"] if "selected records" in line]
    assert line.startswith(
        "2 of the 10 selected records have no response token (1 empty or absent, 1 cut off by max_length=80), so that "
        "nothing can be learnt from them: cut, empty; selection.require_response=true"
    )
    assert "2 of the selected records teach nothing" in run.summary
    assert f"- {line}" in unwrapped(run.summary)


@pytest.mark.parametrize("method", ["trim", "bm25", "full"])
def test_where_a_response_is_required_records_without_have_no_rank(
    method: str, training_files: TrainingFiles, files: list[str], tmp_path: Path
) -> None:
    run = selection(
        *training_files.model, *files, f"method={method}", "selection.require_response=true", "selection.fraction=1.0",
        output_dir=tmp_path / "run", store_dir=training_files.store,
    )  # fmt: skip
    scores = pq.read_table(tmp_path / "run" / "scores.parquet").to_pylist()
    without = {"cut", "empty", "nothing"}
    assert {row["id"] for row in scores if row["score"] is None} == without
    assert all(
        row["rank"] is row["mean"] is row["max"] is row["coverage"] is None for row in scores if row["id"] in without
    )
    assert sorted(row["rank"] for row in scores if row["rank"]) == list(range(1, 9))
    assert {record["id"] for record in lines_of(tmp_path / "run" / "coreset.jsonl")} == {
        *(f"r{n}" for n in range(6)),
        "partway",
        "blank",
    }
    told = "3 of the pool's records have no response token (2 empty or absent, 1 cut off by max_length=80)"
    assert any(line.startswith(f"{told} and are left out: cut, empty, nothing") for line in run.manifest["warnings"])
    assert not any("could not be scored" in line for line in run.manifest["warnings"])
    assert "left out     2 without a response, 1 with their response cut off\n" in run.summary
    assert "truncated    2 records at 80 tokens, 1 of them before their response" in run.summary
    assert run.manifest["counts"]["selected_no_response"] == 0


def test_a_training_selects_what_can_be_learnt_from(
    training_files: TrainingFiles, files: list[str], tmp_path: Path
) -> None:
    def run(*overrides: str) -> Training:
        arguments = [*training_files.model, *files, "selection.count=5", "train.epochs=1", "method=bm25", *overrides]
        return run_train(*arguments, output_dir=tmp_path / "run", store_dir=training_files.store)

    whole = run()
    assert whole.metrics["train/records"] == 5
    assert "left out  2 without a response, 1 with their response cut off\n" in whole.summary
    before = run("selection.require_response=false")
    assert before.metrics["train/records"] == 4
    told = "1 of the 5 records of the coreset have no response token (1 cut off by max_length=80)"
    assert any(line.startswith(told) for line in before.manifest["warnings"])


def test_a_given_coreset_and_held_out_records_are_looked_at_too(
    trained: Callable[..., Training], tmp_path: Path
) -> None:
    records = [{"prompt": f"add {n} and 4", "response": "12 eggs" if n else ""} for n in range(4)]
    write_lines(tmp_path / "some.jsonl", records)
    run = trained(f"coreset.path={tmp_path / 'some.jsonl'}", f"evaluation.path={tmp_path / 'some.jsonl'}")
    told = " ".join(run.manifest["warnings"])
    assert "1 of the 4 records of the coreset have no response token (1 empty or absent)" in told
    assert "1 of the 4 held-out records have no response token (1 empty or absent)" in told
    assert run.metrics["train/records"] == 3


def test_a_warm_up_says_what_teaches_it_nothing(
    training_files: TrainingFiles, files: list[str], tmp_path: Path
) -> None:
    run = selection(
        *training_files.model, *files, "warmup=lora", "warmup.fraction=1.0", "warmup.epochs=1",
        output_dir=tmp_path / "run", store_dir=training_files.store,
    )  # fmt: skip
    told = "3 of the 11 records drawn for the warm-up have no response token and teach it nothing"
    assert told in run.manifest["warnings"]


def test_a_table_without_some_rows() -> None:
    values = np.arange(4, dtype=np.float32)
    numbers = np.ones(4, np.int32)
    table = ScoreTable(values, numbers, numbers, mean=values, groups={"a": values}, order=np.array([2, 0, 3, 1]))
    left = table.without(np.array([0, 3]))
    for column in (left.score, left.mean, left.groups["a"]):
        assert column is not None
        assert column.dtype == np.float32
        assert np.isnan(column).tolist() == [True, False, False, True]
    assert left.max is None
    assert left.order is not None
    assert left.order.tolist() == [2, 1]


def test_held_out_records_whose_responses_are_all_cut_off_are_one_line(
    trained: Callable[..., Training], tmp_path: Path
) -> None:
    write_lines(tmp_path / "long.jsonl", [{"prompt": LONG, "response": "never seen"}] * 2)
    told = r"no held-out record has a response to measure \(2 cut off by max_length=40\); give others or a larger max_l"
    with pytest.raises(UserError, match=told):
        trained(f"evaluation.path={tmp_path / 'long.jsonl'}", "max_length=40")


@pytest.mark.parametrize("asked", ["evaluation.path={}", "train.early_stop=1 train.early_stop_path={}"])
def test_records_that_measure_nothing_are_refused_before_the_selection(
    asked: str, training_files: TrainingFiles, tmp_path: Path
) -> None:
    write_lines(tmp_path / "silent.jsonl", [{"prompt": "count", "response": ""}] * 2)
    words = asked.format(tmp_path / "silent.jsonl").split()
    with pytest.raises(UserError, match=r"no held-out record has a response|no response token to watch"):
        run_train(*training_files.select, *words, output_dir=tmp_path / "run", store_dir=tmp_path / "store")
    assert not list((tmp_path / "store").glob("score/*"))
    assert not (tmp_path / "run" / "selection" / "scores.parquet").exists()
    paths = [f"paths.output_dir={tmp_path / 'run'}", f"paths.store_dir={tmp_path / 'store'}"]
    jobs = [
        compose_train([*training_files.select, *words, *paths, f"pooler={pooler}", f"saliency.num_layers={layers}"])
        for pooler, layers in (("mean", 1), ("max", 2))
    ]
    assert set(plan_jobs(dict(enumerate(jobs))).problems) == {0, 1}, "dry_run says so too"
    assert share_passes(jobs) == 0, "nor does a sweep run a pass for them"
    assert not list((tmp_path / "store").glob("score/*"))


def test_lines_that_could_not_be_read_are_listed_where_the_rest_is_refused(
    training_files: TrainingFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps({"prompt": "count", "response": ""}), "{broken", "[1"]
    (tmp_path / "silent.jsonl").write_text("\n".join(lines) + "\n")
    asked = [f"evaluation.path={tmp_path / 'silent.jsonl'}", "evaluation.bad_records=skip"]
    with pytest.raises(UserError, match="no held-out record has a response"):
        run_train(*training_files.select, *asked, output_dir=tmp_path / "run", store_dir=training_files.store)
    assert [line["place"] for line in lines_of(tmp_path / "run" / "bad_records.jsonl")] == ["line 2", "line 3"]
    assert "2 lines cannot be read and are left out" in caplog.text


@pytest.mark.parametrize(
    ("response", "told"),
    [
        ("", r"\(5 empty or absent\); give another pool; "),
        ("x", r"\(5 cut off by max_length=20\); give .* larger max_l"),
    ],
)
def test_a_pool_without_any_response_is_told_before_it_is_scored(
    tmp_path: Path, tiny_folder: Any, response: str, told: str
) -> None:
    asked = LONG if response else "question"
    lines = [json.dumps({"id": str(place), "prompt": asked, "response": response}) for place in range(5)]
    (tmp_path / "pool.jsonl").write_text("\n".join(lines) + "\n")
    words = [
        "model=hf", f"model.path={tiny_folder('llama')}", "pool=jsonl", f"pool.path={tmp_path / 'pool.jsonl'}",
        "method=random", "logger=none", "trainer=cpu", "selection.count=2", "max_length=20",
    ]  # fmt: skip
    with pytest.raises(UserError, match=rf"pool pool\.jsonl: none of its 5 records has a response .*{told}"):
        run_train(*words, output_dir=tmp_path / "out", store_dir=tmp_path / "store")


def test_answers_that_are_not_judged_are_told(
    trained: Callable[..., Training], training_files: TrainingFiles, tmp_path: Path
) -> None:
    numbers = lines_of(training_files.root / "numbers.jsonl")
    options = lines_of(training_files.root / "options.jsonl")
    silent = [{name: value for name, value in numbers[0].items() if name != "answer"}]
    cases = {
        "first": ([*silent, *numbers[1:3]], "2 of the 3 held-out records have an answer, but the first"),
        "others": ([*numbers[:2], *silent], "exact_match is of 2 of the 3 held-out records"),
        "options": ([*options[:2], {**options[2], "answer": "Z"}], "option_accuracy is of 2 of the 3 held-out records"),
        "all": (numbers[:3], ""),
    }
    for name, (records, told) in cases.items():
        write_lines(tmp_path / f"{name}.jsonl", records)
        run = trained(f"evaluation.path={tmp_path / name}.jsonl", "evaluation.max_new_tokens=2", name=name)
        found = [line for line in run.manifest["warnings"] if "held-out records" in line and "prompt" not in line]
        assert [line[: len(told)] for line in found] == ([told] if told else [])


def test_watched_records_without_a_response_are_told(trained: Callable[..., Training], tmp_path: Path) -> None:
    lines = [{"id": f"w{row}", "prompt": "count", "response": "four" * (row % 2)} for row in range(4)]
    write_lines(tmp_path / "watched.jsonl", lines)
    run = trained("train.early_stop=1", f"train.early_stop_path={tmp_path / 'watched.jsonl'}")
    told = "2 of the 4 records of train.early_stop_path have no response token (2 empty or absent)"
    assert any(line.startswith(told) and line.endswith(": w0, w2") for line in run.manifest["warnings"])


def test_keys_of_a_selection_beside_a_given_coreset_are_told(trained: Callable[..., Training], tmp_path: Path) -> None:
    run = trained("selection.count=3", "pool=jsonl", f"pool.path={tmp_path / 'nope.jsonl'}")
    (line,) = [line for line in run.manifest["warnings"] if line.startswith("coreset.path is given")]
    assert line.endswith("selection.count, pool.path change nothing")


def test_filters_that_leave_nothing_to_train_on(training_files: TrainingFiles, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record of the pool is left to train on; loosen the filters"):
        run_train(
            *training_files.select, "selection.min_tokens=10000", output_dir=tmp_path / "run",
            store_dir=training_files.store,
        )  # fmt: skip


def test_a_misspelt_field_of_a_cap_is_found_before_anything_is_scored(
    training_files: TrainingFiles, tmp_path: Path
) -> None:
    words = [*training_files.select, "selection.cap_field=promt", "selection.cap=2"]
    with pytest.raises(UserError, match=r"selection.cap_field=promt: .* has no such field; did you mean prompt\?"):
        run_train(*words, output_dir=tmp_path / "run", store_dir=tmp_path / "store")
    assert not list((tmp_path / "store").glob("s[ci]*/*"))


@pytest.mark.parametrize("key", ["coreset.path", "train.early_stop_path"])
def test_no_key_is_recommended_that_there_is_not(key: str, training_files: TrainingFiles, tmp_path: Path) -> None:
    words = [*training_files.model, f"{key}={tmp_path / 'odd.jsonl'}"]
    if key != "coreset.path":
        words += [f"coreset.path={training_files.root / 'coreset.jsonl'}", "train.early_stop=1"]
    for lines in (["{broken", "[1"], [json.dumps({"a": 1})] * 2):
        (tmp_path / "odd.jsonl").write_text("\n".join(lines) + "\n")
        with pytest.raises(UserError) as caught:
            run_train(*words, output_dir=tmp_path / "run", store_dir=training_files.store)
        told = str(caught.value)
        assert not [name for name in ("bad_records", "prompt_field", "messages_field") if name in told], told


def test_a_limit_above_the_held_out_records_is_told(trained: Callable[..., Training], tmp_path: Path) -> None:
    write_lines(tmp_path / "held.jsonl", [{"prompt": "count", "response": "four"}] * 3)
    run = trained(f"evaluation.path={tmp_path / 'held.jsonl'}", "evaluation.limit=50", name="beyond")
    told = "evaluation.limit=50: there are only 3 held-out records; all are measured"
    assert told in run.manifest["warnings"]
    run = trained(f"evaluation.path={tmp_path / 'held.jsonl'}", "evaluation.limit=3", name="all")
    assert not any("evaluation.limit" in line for line in run.manifest["warnings"])


@pytest.mark.parametrize(("keys", "told"), [((), True), (("evaluation.exact_match=never",), False)])
def test_answers_that_nobody_asks_for_are_no_matter(
    keys: tuple[str, ...], told: bool, trained: Callable[..., Training], tmp_path: Path
) -> None:
    records = [{"prompt": "count", "response": "four", **({"answer": "four"} if row else {})} for row in range(3)]
    for first in (records, records[1:]):
        write_lines(tmp_path / f"{len(first)}.jsonl", first)
        run = trained(f"evaluation.path={tmp_path / f'{len(first)}.jsonl'}", "evaluation.max_new_tokens=2", *keys,
                      name=f"answers_{len(first)}_{told}")  # fmt: skip
        found = [line for line in run.manifest["warnings"] if "which decides" in line]
        assert len(found) == (told and len(first) == 3)
