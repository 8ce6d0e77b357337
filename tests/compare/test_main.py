"""The command: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made_runs import edit

from trim_lightning.cli.compare import main


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard output of a comparison that must go well."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = compared(capsys, sweep, "--bootstrap", 200)
    assert "4 finished runs in 2 groups" in text
    assert "budget 4 records, trainee model" in text
    assert "varied: method.name (2); seed (3)" in text
    for title in ("over seeds", "differences (group minus the other", "overlap of the coresets", "best by metric",
                  "marginal means", "rank correlation"):  # fmt: skip
        assert title in text
    assert "warning: random (A), 4 records, has 3 selection seeds; at least 5 are needed" in text
    rows = rows_of(sweep / "compare.csv")
    assert [row["run"] for row in rows] == ["0", "1", "2", "3"]
    for job, row in enumerate(rows):
        numbers = json.loads((sweep / str(job) / "metrics.json").read_text())
        for name in ("eval/nll", "eval/nll_low", "eval/nll_before", "eval/nll_drop", "eval/exact_match_high",
                     "eval/option_accuracy", "train/tokens", "train/trained_tokens", "train/seconds",
                     "select/seconds"):  # fmt: skip
            assert float(row[name]) == numbers[name]
        assert int(row["records"]) == 4
        assert float(row["mean_tokens"]) == int(row["tokens"]) / 4
        assert float(row[f"overlap/{job}"]) == 1
        assert row["config/method.name"] == row["method"] == ("longest" if job == 3 else "random")
        assert f"{numbers['eval/nll']:.4f} [{numbers['eval/nll_low']:.4f}, {numbers['eval/nll_high']:.4f}]" in text
    table = pq.read_table(sweep / "compare.parquet").to_pylist()
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in table] == rows
    tests = rows_of(sweep / "compare_differences.csv")
    assert [(row["method"], row["against_method"], row["metric"]) for row in tests] == [
        ("longest", "random", metric) for metric in ("nll", "exact_match", "option_accuracy")
    ]
    assert {row["equal_in"] for row in tests} <= {"records", "records and tokens"}
    assert {row["against_seeds"] for row in tests} == {"3"}
    for row in tests:  # the columns of the test are there, and say nothing
        assert [row[name] for name in ("low", "high", "p", "p_holm", "verdict")] == [""] * 5
        assert (row["runs"], row["against_runs"], row["untested"]) == ("1", "3", "1 run: too few to tell")
        assert float(row["records_low"]) <= float(row["difference"]) <= float(row["records_high"])
    schema = pq.read_schema(sweep / "compare_differences.parquet")
    assert [str(schema.field(name).type) for name in ("low", "p", "verdict")] == ["double", "double", "string"]
    assert text.count("1 run: too few to tell") == 3
    page = (sweep / "compare.html").read_text()
    for words in (text[text.index("differences (") :].partition("\n\n")[0], page[page.index('id="tests"') :][:9000]):
        assert "too few to tell" in words
        assert not re.search(r"\b(better|worse|p-value)\b", words.partition("</section>")[0])


def test_several_selections(selections: dict[str, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text = compared(capsys, selections["trim"], selections["random_0"])
    assert "written: compare.csv, compare.parquet, compare.html in ." in text
    assert "scorer" in text
    assert "warning: random (B), 6 records, has 1 selection seed; at least 5 are needed" in text
    assert "differences" not in text
    assert not (tmp_path / "compare_differences.csv").exists()
    assert [row["scorer"] for row in rows_of(tmp_path / "compare.csv")] == ["model", ""]
    compared(capsys, selections["trim"], selections["random_0"], "--output", tmp_path / "there")
    assert (tmp_path / "there" / "compare.parquet").exists()


def test_broken_runs_do_not_stop_the_others(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep / "1" / "manifest.json").unlink()
    (sweep / "2" / "metrics.json").write_text("{")
    (sweep / "4").mkdir()
    text = compared(capsys, sweep)
    assert "2 finished runs" in text
    left_out = text[text.index("left out: 3 runs") :].splitlines()[3:6]
    assert [line.split()[0] for line in left_out] == ["1", "2", "4"]
    assert "metrics.json cannot be read" in left_out[1]
    assert "manifest.json is missing: the run did not finish" in left_out[2]


def test_a_metric_that_only_some_have_is_a_dash(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(sweep / "3", lambda numbers: numbers.update({"eval/trim_gsm8k/exact_match": 0.25}), "metrics.json")
    edit(sweep / "3", lambda numbers: numbers.update({"eval/trim_gsm8k/exact_match_before": 0.125}), "metrics.json")
    text = compared(capsys, sweep)
    header = next(line for line in text.splitlines() if line.startswith("run"))
    assert "trim_gsm8k/exact_match" in header
    assert "trim_gsm8k/exact_match_before" not in header
    values = [row["eval/trim_gsm8k/exact_match"] for row in rows_of(sweep / "compare.csv")]
    assert values == ["", "", "", "0.25"]
    assert rows_of(sweep / "compare.csv")[3]["eval/trim_gsm8k/exact_match_before"] == "0.125"


def test_unequal_budgets_and_settings_are_in_plain_sight(sweep: Path, made_runs, capsys) -> None:
    made_runs.train(sweep / "4", "method=longest", "selection.count=7", "train.epochs=2")
    text = compared(capsys, sweep)
    line = next(line for line in text.splitlines() if line.startswith("longest (C)") and " nll " in line)
    assert "neither" in line
    assert "7/4" in line
    assert "train.epochs" in line
    row = next(row for row in rows_of(sweep / "compare_differences.csv") if row["group"] == "C")
    assert (row["equal_in"], row["differs_also_in"]) == ("neither", "train.epochs")
    assert "do not fill the grid" in text


def test_without_a_random_run(trained: dict[str, Path], variant, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    other = variant(trained["longest"], "other", lambda manifest: manifest["config"].update(scope="response"))
    text = compared(capsys, trained["longest"], other)
    assert "no random run to compare with" in text
    text = compared(capsys, trained["longest"], other, "--all-pairs")
    assert "no random run" not in text
    assert [row["difference"] for row in rows_of(tmp_path / "compare_differences.csv")] == ["0.0"] * 3


def test_many_runs_get_a_matrix_of_groups(selections, variant, tmp_path, capsys) -> None:
    copies = [variant(selections["random_0"], f"job{place}") for place in range(12)]
    text = compared(capsys, *copies, selections["random_1"], selections["trim"], "--output", tmp_path)
    title = "overlap of the coresets (Jaccard), mean over the runs of two groups"
    rows = [line.split() for line in text[text.index(title) :].splitlines()[3:5]]
    cells = rows_of(tmp_path / "compare.csv")
    seeds = float(cells[0]["overlap/#13"])
    within = (12 * 11 + 2 * 12 * seeds) / (13 * 12)  # of the first group's ordered pairs
    between = (12 * float(cells[0]["overlap/#14"]) + float(cells[12]["overlap/#14"])) / 13
    assert rows == [["random", "(A)", f"{within:.3f}", f"{between:.3f}"], ["trim", "(B)", f"{between:.3f}", "-"]]


def test_many_groups_get_a_summary_in_place_of_a_matrix(selections, variant, tmp_path, capsys) -> None:
    copies = [
        variant(
            selections["random_0"], f"job{place}", lambda manifest, place=place: manifest["config"].update(scope=place)
        )
        for place in range(13)
    ]
    text = compared(capsys, *copies, "--output", tmp_path)
    assert "overlap of the coresets (Jaccard) with the other runs" in text
    rows = rows_of(tmp_path / "compare.csv")
    assert {rows[3][f"overlap/job{place}"] for place in range(13)} == {"1.0"}


def test_long_names_get_numbers(selections, variant, tmp_path, capsys) -> None:
    copies = [variant(selections["random_0"], f"a_rather_long_name_{place}") for place in range(2)]
    text = compared(capsys, *copies, "--output", tmp_path)
    assert "#1" in text
    assert "overlap/#2" in rows_of(tmp_path / "compare.csv")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: does not exist"),
        (["nowhere", "--embed", "./no/such"], "nowhere: does not exist"),
        ([], "the following arguments are required"),
        (["{run}", "--bootstrap", "5"], "at least 100"),
        (["{run}", "--seed", "-1"], "at least 0"),
        (["{run}", "--color"], "unrecognized arguments: --color"),
        (["{run}", "--output", "{file}"], "File exists"),
        (["{run}", "--embed", "./no/such"], "error: --embed=./no/such: no such directory; give a model directory"),
    ],
)
def test_mistakes_end_with_one_line_and_2(selections, tmp_path, capsys, arguments, message) -> None:
    (tmp_path / "file").touch()
    places = {"run": selections["trim"], "file": tmp_path / "file"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_nothing_finished_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0").mkdir()
    assert main([str(tmp_path)]) == 2
    assert "manifest.json is missing" in capsys.readouterr().err


def test_it_needs_no_torch_and_survives_a_closed_pipe(selections: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from trim_lightning.cli.compare import main; code = main(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, str(selections["trim"]), "--output", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, timeout=600).returncode == 0
    piped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert piped.stdout is not None
    piped.stdout.close()
    _, errors = piped.communicate(timeout=600)
    assert piped.returncode == 0
    assert b"Traceback" not in errors
