"""What a terminal shows: the short help, the picks, tables of 80 columns, warnings once, colours only where wanted."""

from __future__ import annotations

import io
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins

from cli.conftest import CONSOLE_SCRIPT, Inputs, Run, run_process
from trim_lightning.cli.hydra_app import quieten_libraries, train_main
from trim_lightning.console.progress import InPlaceOfBars, progress_bar
from trim_lightning.console.terminal import WIDTH, columns_of, cut, pairs_text, wants_colour, wrapped
from trim_lightning.pipeline.picks import Pick, picks_text
from trim_lightning.settings.key import known_keys
from trim_lightning.settings.schema import SelectSettings, TrainSettings

SCREEN = 40  # lines
COLOUR = "\x1b["


def too_wide(text: str) -> list[str]:
    """Lines wider than a terminal; a path has no place to be broken at."""
    return [line for line in text.splitlines() if columns_of(line) > WIDTH and " " in line.strip().lstrip("- ")]


@pytest.mark.parametrize(
    ("main", "kind"), [(None, SelectSettings), (train_main, TrainSettings)], ids=["select", "train"]
)
def test_help_is_one_screen_and_help_all_has_every_key(main: Any, kind: type, run: Run) -> None:
    given = {} if main is None else {"main": main}
    short, full = run("--help", **given), run("--help-all", **given)
    assert (short.code, full.code) == (0, 0), short.err + full.err
    assert len(short.out.splitlines()) < SCREEN
    assert too_wide(short.out) == []
    assert "--help-all" in short.out
    keys = re.findall(r"^  ([a-z_.]+)=", full.out, flags=re.MULTILINE)
    assert keys == [name for name, *_ in known_keys(kind)]
    assert "pooler: max, mean, mean_max" in full.out
    assert "layers whose attention is read" in full.out


def test_the_summary_fits_and_shows_the_picks_first(run: Run, inputs: Inputs) -> None:
    outcome = run(*inputs.arguments, "method=random", "selection.count=9", "max_length=20", "paths.output_dir=out")
    assert outcome.code == 0, outcome.err
    shown = outcome.out[outcome.out.index("picked, best first") :]
    assert too_wide(shown) == []
    lines = shown.splitlines()
    assert re.match(r"  1  \d\.\d{4}  \S", lines[1])
    assert lines[9] == "and 1 more"
    assert lines[11].startswith("method ")
    assert COLOUR not in outcome.out


def test_picks_are_coloured_by_whether_the_targets_are_of_their_kind() -> None:
    picks = [
        Pick(0.5, "sums", True, "one\n two"),
        Pick(0.25, "trips", False, "x" * 200),
        Pick(0.1, "", False, "\u202e"),
    ]
    plain, coloured = picks_text(picks, 5, False), picks_text(picks, 5, True)
    assert COLOUR not in plain
    assert plain.splitlines()[1] == "  1  0.5000  sums   one two"
    assert plain.splitlines()[2].endswith("x…")
    assert "⟨U+202E⟩" in plain
    assert plain.splitlines()[-1] == "and 2 more"
    assert "\x1b[32msums" in coloured
    assert "\x1b[33mtrips" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain
    assert too_wide(plain) == []


def test_no_colour_without_a_terminal_or_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert wants_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour()
    assert wants_colour("always")


def test_texts_are_cut_and_wrapped_by_columns() -> None:
    assert cut("a  b\nc", 5) == "a b c"
    assert cut("abcdef", 4) == "abc…"
    assert columns_of(cut("漢字漢字漢字", 6)) <= 6
    path = "/a" * 60
    assert wrapped(f"see {path} there", "- ", "  ").splitlines() == ["- see", f"  {path}", "  there"]
    assert pairs_text([["one", "x " * 60], ["three", 5]]).splitlines()[-1] == "three  5"
    assert too_wide(pairs_text([["one", "x " * 60]])) == []


def test_a_warning_is_told_once_for_the_jobs_of_a_sweep(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    pool = tmp_path / "same.jsonl"
    pool.write_text('{"prompt": "a", "response": "b"}\n' * 12)
    files = [*inputs.arguments, f"pool.path={pool}", "method=longest", "selection.count=2", "target.num_examples=2,3"]
    outcome = run("-m", *files, "hydra.sweep.dir=sweep")
    assert outcome.code == 0, outcome.err
    warning = "all 12 scores are equal"
    told = [line for line in outcome.out.splitlines() if warning in line]
    assert len(told) == 2, told  # when it came, and in the list at the end
    assert outcome.out.rindex(warning) > outcome.out.rindex("files: ")
    assert outcome.out.count("warnings of the jobs:") == 1
    for job in "01":  # each job's own log and manifest have it
        (log,) = (tmp_path / "sweep" / job).glob("*.log")
        assert warning in log.read_text()
        assert warning in (tmp_path / "sweep" / job / "manifest.json").read_text()
    alone = run(*files[:-1], "target.num_examples=2", "paths.output_dir=alone")
    assert len(re.findall(warning, alone.out)) == 2  # in the log, and again below the tables


def test_a_sweep_with_a_failed_job_fails_whatever_the_sweeper_says(
    run: Run, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna's sweeper goes on without failed trials, and ends as if all were well."""
    run("--help")  # Hydra finds its plugins, as modules of its own
    (found,) = [
        kind for name, kind in Plugins.instance().class_name_to_class.items() if name.endswith("SharingLauncher")
    ]
    forgiving = property(lambda self: 1.0, lambda self, value: setattr(self, "_return_value", value))
    monkeypatch.setattr(found.launch.__globals__["QuietReturn"], "return_value", forgiving)
    sweep = ["-m", *inputs.arguments, "method=random", "hydra.sweep.dir=sweep"]
    failed = run(*sweep, "selection.count=2,99999")
    assert failed.code == 2
    assert failed.last.startswith("error: selection.count=99999")
    assert run(*sweep, "selection.count=2,3").code == 0  # nothing is left of the sweep before


def test_a_log_line_stands_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", terminal)
    handler = logging.StreamHandler(terminal)
    handler.addFilter(InPlaceOfBars())
    logger = logging.Logger("bars")
    logger.addHandler(handler)
    with progress_bar("score", total=3) as bar:
        bar.update(1)
        logger.warning("look here")
        bar.update(1)
    (line,) = [line for line in terminal.getvalue().split("\n") if "look here" in line]
    assert line.rpartition("\r")[2].strip() == "look here"  # what the bar had written is gone
    logger.warning("and now")
    assert terminal.getvalue().endswith("and now\n")


@pytest.mark.slow
def test_a_profile_is_taken_without_a_word(inputs: Inputs, tmp_path: Path) -> None:
    """The profiler's C++ writes to standard error by itself, so only a process of its own shows it."""
    arguments = [*inputs.arguments, "debug=profile", "paths.output_dir=out"]
    environment = {name: value for name, value in os.environ.items() if "LOG_LEVEL" not in name}
    outcome = run_process(CONSOLE_SCRIPT, *arguments, cwd=tmp_path, environment=environment)
    assert (outcome.code, outcome.complaints) == (0, [])
    assert (tmp_path / "out" / "profile" / "trace.json.gz").is_file()


def test_libraries_colour_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "KINETO_LOG_LEVEL", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # so that it is taken back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    quieten_libraries(["debug=fast"])
    assert not {"NO_COLOR", "KINETO_LOG_LEVEL"} & set(os.environ)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    quieten_libraries(["debug=fast"])
    assert os.environ["NO_COLOR"] == "1"
    assert "KINETO_LOG_LEVEL" not in os.environ
