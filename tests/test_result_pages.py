"""Pages of results: what their files say can be run, and a page says what its runs say."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from running import run_select
from tiny_models import write_records
from trim_lightning.settings.key import known_keys
from trim_lightning.settings.schema import TrainSettings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GROUPS = (
    "pool",
    "model",
    "logger",
    "target",
    "warmup",
    "pooler",
    "method",
    "saliency",
    "fallback",
    "evaluation",
    "experiment",
)


@pytest.fixture(scope="module")
def pages() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("pages")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", sorted(file.stem for file in (BENCHMARKS / "experiments").glob("*.yaml")))
def test_commands_name_keys_that_exist(pages: ModuleType, name: str) -> None:
    experiment = pages.Experiment.read(name)
    known = {key for key, *_ in known_keys(TrainSettings)} | set(GROUPS)
    for part in experiment.parts:
        program, *words = experiment.words(part)
        assert program in ("trim-select", "trim-train")
        overrides = [word for word in words if word != "-m"]
        for override in OverridesParser.create().parse_overrides(overrides):
            assert override.key_or_group in known, override.key_or_group
    assert experiment.title
    assert set(experiment.axes) <= known


def test_a_page_says_what_its_runs_say(
    pages: ModuleType, tmp_path: Path, tiny_folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(tmp_path / "pool.jsonl", 40, seed=1)
    lines = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    marked = [{**line, "category": "cot_math" if place % 2 else "other"} for place, line in enumerate(lines)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(line) + "\n" for line in marked))
    monkeypatch.setattr(pages, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(pages, "PAGES", tmp_path / "pages")
    for method, seed in (("longest", 0), ("random", 0), ("random", 1), ("random", 2)):
        run_select(
            "model=hf", f"model.path={tiny_folder('llama')}", f"method={method}", "pool=jsonl", "target=from_pool",
            f"pool.path={tmp_path / 'pool.jsonl'}", "selection.count=8", f"seed={seed}", "logger=none",
            output_dir=tmp_path / "runs" / "trial" / method / str(seed), store_dir=tmp_path / "store",
        )  # fmt: skip
    experiment = pages.Experiment(
        name="trial", title="A trial", question="What is?", data="Some.",
        parts=[pages.Part(name, f"trim-select method={name}") for name in ("longest", "random")],
        metrics=["share_cot_math", "mean_tokens_selected"], axes=["method"], finding="It shows that.", overlap=True,
    )  # fmt: skip
    text = pages.write(experiment).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| random") or line.startswith("| longest")]
    assert len(rows) == 2
    coresets = [
        [json.loads(line)["category"] for line in (tmp_path / f"runs/trial/random/{seed}/coreset.jsonl").open()]
        for seed in range(3)
    ]
    shares = [kinds.count("cot_math") / len(kinds) for kinds in coresets]
    assert f"| {pages.interval(shares)} " in rows[1]
    assert "trim-select method=longest" in text
    assert "It shows that." in text
    assert (tmp_path / "pages" / "trial.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(("metric", "behind"), [("nll", "2 of 3"), ("exact_match", "1 of 3")])
def test_how_many_random_runs_are_behind(pages: ModuleType, metric: str, behind: str) -> None:
    def group(*values: float) -> SimpleNamespace:
        runs = [SimpleNamespace(measurements={metric: SimpleNamespace(value=value)}) for value in values]
        return SimpleNamespace(runs=runs)

    # the mean is 0.2; a loss is better below, an accuracy above
    item = SimpleNamespace(metric=metric, first=group(0.1, 0.3), second=group(0.15, 0.25, 0.35))
    assert pages.ahead_of(item) == behind


@pytest.mark.parametrize(
    ("holm", "runs", "verdict"),
    [(0.04, (5, 5), "**better**"), (0.06, (5, 5), "not told apart"), (None, (3, 8), "3 runs: too few to tell")],
)
def test_verdicts_are_those_of_the_comparison(
    pages: ModuleType, holm: float | None, runs: tuple[int, int], verdict: str
) -> None:
    group = SimpleNamespace()
    item = pages.Comparison(group, group, "nll", -0.1, (-0.2, -0.1), runs, 100, p=holm, holm=holm)
    assert pages.verdict(item) == verdict


def test_usual_values_of_axes_are_not_told(pages: ModuleType) -> None:
    experiment = pages.Experiment(
        name="trial", title="", question="", data="", parts=[], axes=["method", "scope", "selection.cap"],
        usual={"scope": "all"},
    )  # fmt: skip
    settings = [{"scope": "all", "selection.cap": 8}, {"scope": "response", "selection.cap": None}]
    labels = [pages.label_of(experiment, SimpleNamespace(method="trim", settings=found)) for found in settings]
    assert labels == ["trim selection.cap=8", "trim scope=response selection.cap=null"]


def test_a_changed_command_is_not_taken_for_done(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIM_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(pages, "RUNS", tmp_path)
    part = pages.Part("random", "trim-train -m method=random seed=0,1 $COMMON")
    experiment = pages.Experiment(name="trial", title="", question="", data="", parts=[part], common="warmup=none")
    folder = tmp_path / "trial" / "random"
    folder.mkdir(parents=True)
    for content in ("", '{"peak_gib": 1.0}', '{"command": "trim-train -m method=random seed=0,1 warmup=none"}'):
        (folder / "done").write_text(content)
        pages.run(experiment)  # nothing is run
    (folder / "done").write_text('{"command": "trim-train -m method=random seed=0 warmup=none"}')
    with pytest.raises(SystemExit, match="of another command"):
        pages.run(experiment)


def test_intervals(pages: ModuleType) -> None:
    assert pages.interval([]) == ""
    assert pages.interval([0.0, 0.0]) == "0"
    assert pages.interval([0.5]) == "0.5000"
    assert pages.interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # t of 2 degrees of freedom 4.30, standard error 0.577


README = BENCHMARKS.parent / "README.md"


@pytest.fixture(scope="module")
def readme(pages: ModuleType) -> ModuleType:
    return pages.readme


def test_the_readme_says_what_the_pages_say(readme: ModuleType) -> None:
    text = README.read_text()
    assert sorted(match[2] for match in readme.BLOCK.finditer(text)) == sorted(readme.BLOCKS)
    assert text == readme.filled(text), "README.md is out of date: run `make readme`"
    assert len(text.splitlines()) < 150


PAGE = """# What a record teaches

## The gain itself

| method                     | Spearman               | against trim           |
|----------------------------|------------------------|------------------------|
| one pass: some formula     | +0.60 (+0.20 to +0.80) | +0.10 (-0.20 to +0.40) |
| trim                       | +0.50 (+0.20 to +0.70) |                        |
| trim, some variant         | +0.45 (+0.20 to +0.70) | -0.05 (-0.20 to +0.10) |
| bm25                       | +0.20 (-0.10 to +0.50) | -0.30 (-0.60 to -0.10) |
| random scores (20 draws)   | -0.02                  |                        |

## What is special to a task

| method   | Spearman               | against trim   |
|----------|------------------------|----------------|
| trim     | +0.10 (-0.20 to +0.30) |                |

| method   | mean, deviations   |
|----------|--------------------|
| trim     | +0.80              |

| method   | passes   |
|----------|----------|
| trim     | 1.02     |
| bm25     | 0.00     |
"""


def test_the_readme_shows_methods_that_can_be_chosen_and_not_the_instruments_formulas(readme: ModuleType) -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.value(PAGE).splitlines()[2:]]
    assert rows == [
        ["**TRIM**", "+0.50 (+0.20 to +0.70)", "+0.80", "1.02"],
        ["BM25", "+0.20 (-0.10 to +0.50)", "", "0.00"],
        ["**random**", "-0.02", "", ""],
    ]
