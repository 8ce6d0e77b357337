"""``--help``, ``--cfg`` and ``-m`` as a user types them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from cli.conftest import CONSOLE_SCRIPT, Inputs, Outcome, Run, run_process
from composing import compose_select
from trim_lightning.cli.hydra_app import select_main
from trim_lightning.models.precision import asks_torch
from trim_lightning.settings.compose import config_directory
from trim_lightning.settings.key import known_keys
from trim_lightning.settings.schema import SelectSettings

HEAVY = ("torch", "transformers", "lightning", "datasets", "peft", "wandb", "pyarrow", "numpy", "reasoning_gym")
HELP = f"""
import sys
from trim_lightning.cli.hydra_app import select_main
code = select_main()
print("LOADED", *(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""
CONF = config_directory()


def asks_torch_here() -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch", raising=False)
        return asks_torch()


GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "train"))


@pytest.fixture(scope="module")
def help_told(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What ``trim-select --help`` prints, in a process of its own and an empty folder."""
    folder = tmp_path_factory.mktemp("help")
    outcome = run_process(sys.executable, "-c", HELP, "--help", cwd=folder)
    assert list(folder.iterdir()) == []
    return outcome


@pytest.fixture(scope="module")
def help_text(help_told: Outcome) -> str:
    assert help_told.code == 0
    return help_told.out


def test_help_loads_nothing_heavy(help_told: Outcome) -> None:
    assert help_told.code == 0
    assert help_told.err.strip() == "LOADED"


@pytest.mark.skipif(asks_torch_here(), reason="this machine may have a GPU: torch must say")
def test_a_run_from_the_store_loads_no_torch(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    """Loading it takes longer than such a run: each job of a sweep on a cluster is one."""
    words = [*inputs.arguments, "warmup.fraction=0.3", "warmup.epochs=1", "model.dtype=auto"]
    assert run(*words).code == 0
    told = run_process(sys.executable, "-c", HELP, *words, cwd=tmp_path)
    assert told.code == 0
    loaded = told.err.splitlines()[-1].split()
    assert loaded[0] == "LOADED"
    assert not {"torch", "transformers", "lightning", "peft"} & {*loaded}


def test_full_help_lists_every_option(run: Run) -> None:
    told = run("--help-all").out
    for group in GROUPS:
        listed = re.search(rf"^ *{group}: (.+)$", told, flags=re.MULTILINE)
        assert listed, group
        assert listed.group(1).split(", ") == sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def test_help_names_only_keys_that_exist(help_text: str) -> None:
    named = re.findall(r"^ +([a-z_]+(?:\.[a-z_]+)?)[=|]", help_text, flags=re.MULTILINE)
    assert len(named) > 10
    assert set(named) <= {key for key, *_ in known_keys(SelectSettings)} | set(GROUPS)


def test_commands_in_the_help_compose(help_text: str) -> None:
    commands = re.findall(r"^ +trim-select (?!init )((?:-m )?[a-z].+)$", help_text, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        words = command.split()
        sweep = words[0] == "-m"
        # of a multirun, the first job and the last
        for place in (0, -1):
            chosen = [word.partition("=")[0] + "=" + word.partition("=")[2].split(",")[place] for word in words[sweep:]]
            compose_select([*chosen, "paths.output_dir=out"])


def test_cfg_job_prints_every_key_and_runs_nothing(run: Run, tmp_path: Path) -> None:
    outcome = run("--cfg", "job", "seed=3")
    assert (outcome.code, outcome.err) == (0, "")
    config = yaml.safe_load(outcome.out)
    for key, *_ in known_keys(SelectSettings):
        value = config
        for part in key.split("."):
            assert part in value, key
            value = value[part]
    assert config["seed"] == 3
    assert "hydra" not in config
    assert list(tmp_path.iterdir()) == []


def test_cfg_of_one_group(run: Run) -> None:
    outcome = run("--cfg", "job", "--package", "pooler", "pooler=quantile")
    assert yaml.safe_load(outcome.out)["name"] == "quantile"
    missing = run("--cfg", "job", "--package", "nothing")
    assert missing.code == 2
    assert missing.last.startswith("error: ")


def test_multirun_over_two_poolers(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    outcome = run("-m", *inputs.arguments, "pooler=mean,max", "hydra.sweep.dir=sweep")
    assert (outcome.code, outcome.complaints) == (0, [])
    jobs = sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert jobs == ["0", "1"]
    tables = []
    for job, pooler in zip(jobs, ("mean", "max"), strict=True):
        directory = tmp_path / "sweep" / job
        names = {path.name for path in directory.iterdir()}
        assert names >= {
            "scores.parquet", "coreset.jsonl", "target_tokens.parquet", "fingerprints.safetensors", "manifest.json",
            "metrics.csv", "select.log", ".hydra",
        }  # fmt: skip
        config = json.loads((directory / "manifest.json").read_text())["config"]
        assert config["pooler"]["name"] == pooler
        assert config["paths"]["output_dir"] == f"sweep/{job}"
        tables.append(pq.read_table(directory / "scores.parquet").to_pydict())
    for table, column in zip(tables, ("mean", "max"), strict=True):
        assert table["score"] == table[column]
    assert tables[0]["mean"] == tables[1]["mean"]
    # the model ran once; pooling is arithmetic on what it left
    stages = json.loads((tmp_path / "sweep" / "1" / "manifest.json").read_text())["stages"]
    assert {stage: record["cached"] for stage, record in stages.items() if stage != "select"} == {
        "tokenize": True, "warmup": True, "fingerprint": True, "score": True,
    }  # fmt: skip


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "debug").glob("*.yaml")))
def test_debug_options_run(option: str, run: Run, inputs: Inputs, tmp_path: Path) -> None:
    outcome = run(*inputs.arguments, f"debug={option}", "paths.output_dir=out")
    assert (outcome.code, outcome.complaints) == (0, [])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    limit = yaml.safe_load((CONF / "debug" / f"{option}.yaml").read_text()).get("pool", {}).get("limit", 40)
    assert manifest["counts"]["pool"] == min(limit, 40)
    assert (tmp_path / "out" / "profile").is_dir() == (option == "profile")


def test_what_a_user_sees(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    outcome = run(*inputs.arguments, "seed=5", "paths.output_dir=out", "paths.store_dir=store")
    assert (outcome.code, outcome.complaints) == (0, [])  # not one warning of a library
    lines = outcome.out.splitlines()
    told = [line for line in lines if re.match(r"\d\d:\d\d:\d\d (INFO   |WARNING) ", line)]
    story = ["pool", "targets", "scorer", "tokenize", "warmup", "fingerprint", "score"]
    subjects = [re.split(r"[ :]", line[17:])[0] for line in told]
    assert [subject for subject in subjects if subject in story] == story
    # after the log only the summary, which ends with the place of the files
    assert lines[lines.index(told[-1]) + 1] == ""
    assert lines[-1] == "files: out"
    for start in ("method ", "scorer ", "pool ", "targets ", "scored ", "selected ", "fallback ", "subtask "):
        assert any(line.startswith(start) for line in lines), start
    log = next((tmp_path / "outputs").rglob("select.log")).read_text()
    assert log.splitlines() == told
    again = run(*inputs.arguments, "seed=5", "paths.output_dir=out", "paths.store_dir=store")
    assert len(re.findall(r"INFO    (?:tokenize|warmup|fingerprint|score): from the store", again.out)) == 4


def test_the_console_script_is_this_function() -> None:
    assert f"from {select_main.__module__} import {select_main.__name__}" in CONSOLE_SCRIPT.read_text()
