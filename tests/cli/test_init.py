"""``trim-select init``: a config for one's own data, and the command that it prints."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from cli.conftest import Inputs, Outcome, Run
from trim_lightning.cli.init import as_yaml

CONFIG = Path("experiment", "own.yaml")


def printed(outcome: Outcome, program: str) -> list[str]:
    """The arguments of the command that was printed for a program."""
    assert outcome.code == 0, outcome.err
    (line,) = re.findall(rf"^ +{program} (.+)$", outcome.out, flags=re.MULTILINE)
    return shlex.split(line)


def test_the_printed_command_selects_from_the_named_files(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    pool, targets = inputs.root / "pool.jsonl", inputs.root / "targets.jsonl"
    outcome = run("init", str(pool), str(targets))
    text = (tmp_path / CONFIG).read_text()
    assert "40 records, layout prompt/response" in text
    assert "group_field: subtask" in text  # what the targets' records have
    arguments = printed(outcome, "trim-select")
    model = [argument for argument in inputs.arguments if not argument.startswith(("pool", "target"))]
    assert run(*arguments, *model, "method=random", "selection.fraction=0.5", "paths.output_dir=out").code == 0
    config = json.loads((tmp_path / "out" / "manifest.json").read_text())["config"]
    assert (config["pool"]["source"], config["method"]["name"], config["selection"]["fraction"]) == (
        "file",
        "random",
        0.5,
    )
    assert len((tmp_path / "out" / "coreset.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize("given", [[], ["pool"], ["pool", "targets"]], ids=len)
def test_the_config_composes_for_both_commands(given: list[str], run: Run, inputs: Inputs, tmp_path: Path) -> None:
    from trim_lightning.cli.hydra_app import train_main

    outcome = run("init", *(str(inputs.root / f"{name}.jsonl") for name in given))
    shown = run("--cfg", "job", *printed(outcome, "trim-select"))
    config = yaml.safe_load(shown.out)
    assert shown.code == 0, shown.err
    assert config["target"]["source"] == ("from_pool" if given == ["pool"] else "file")
    assert config["pool"]["path"] == (str(inputs.root / "pool.jsonl") if given else "pool.jsonl")
    assert config["selection"]["fraction"] == 0.05
    shown = run("--cfg", "job", *printed(outcome, "trim-train"), main=train_main)
    assert yaml.safe_load(shown.out)["evaluation"]["path"] == "FILE"


def test_nothing_is_overwritten(run: Run, tmp_path: Path) -> None:
    assert run("init").code == 0
    (tmp_path / CONFIG).write_text("mine")
    again = run("init")
    assert (again.code, again.last) == (
        2, f"error: {CONFIG}: exists already and is not overwritten; give --name for another, or remove it"
    )  # fmt: skip
    assert (tmp_path / CONFIG).read_text() == "mine"
    assert run("init", "--name", "other").code == 0
    assert sorted(path.name for path in (tmp_path / "experiment").iterdir()) == ["other.yaml", "own.yaml"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere.jsonl",), "pool.path=nowhere.jsonl"),
        (("--name", "a/b"), "--name=a/b"),
        (("one", "two", "three"), "unrecognized arguments: three"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    arguments: tuple[str, ...], told: str, run: Run, tmp_path: Path
) -> None:
    outcome = run("init", *arguments)
    assert outcome.code == 2
    (line,) = outcome.complaints
    assert told in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["it's {odd}, #1: ${x}.jsonl", "- null.jsonl", "true", "two\nseed: 7\u2028x.jsonl"])
def test_a_path_of_any_characters_comes_back(name: str, run: Run, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((inputs.root / "pool.jsonl").read_bytes())
    outcome = run("init", name) if not name.startswith("-") else run("init", "--", name)
    assert outcome.code == 0, outcome.err
    shown = run("--cfg", "job", "--resolve", "--config-dir", ".", "experiment=own", "paths.output_dir=out")
    assert yaml.safe_load(shown.out)["pool"]["path"] == name, shown.err


@pytest.mark.parametrize("path", ["a\x85 b", "a \u2028b", "a\n\nb: 1 #", b"\xff\n".decode(errors="surrogateescape")])
def test_a_path_with_any_line_break_is_one_line(path: str) -> None:
    assert as_yaml(path).encode().isascii()
    assert yaml.safe_load(f"pool:\n  path: {as_yaml(path)} # told\n") == {"pool": {"path": path}}


def test_the_name_of_a_field_stays_in_its_comment(run: Run, tmp_path: Path) -> None:
    field = "chat\nseed: 7\n\u2028hydra: x \u202e"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "pool.jsonl").write_text(json.dumps({field: turns}) + "\n")
    assert run("init", "pool.jsonl").code == 0
    (line,) = [line for line in (tmp_path / CONFIG).read_text().splitlines() if "seed: 7" in line]
    assert line.endswith("# 1 records, layout chat seed: 7 hydra: x ⟨U+202E⟩")
    assert yaml.safe_load((tmp_path / CONFIG).read_text())["seed"] == 0
