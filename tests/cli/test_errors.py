"""Every mistake gives exit code 2 and one line that names it; ours give 1 and a traceback; an interrupt gives 130."""

from __future__ import annotations

import errno
import gzip
import json
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

import trim_lightning.pipeline.select
from cli.conftest import CONSOLE_SCRIPT, Inputs, Outcome, Run, final_files, run_process
from trim_lightning.cli.exits import fail
from trim_lightning.cli.hydra_app import Job, mean_score, select_task
from trim_lightning.errors import UserError
from trim_lightning.pipeline.select import Selection

GOOD = b'{"prompt": "a question", "response": "an answer"}\n'
ROOT = Path(__file__).resolve().parents[2]

# file content -> what the error line must hold
BAD_POOLS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "malformed": (GOOD + GOOD + b"{oops\n", ("bad.jsonl line 3", "not valid JSON", "mend or delete that line")),
    "missing field": (GOOD + b'{"prompt": "a"}\n', ("bad.jsonl line 2", "response", "missing", "mend or delete")),
    "number for text": (GOOD + b'{"prompt": "a", "response": 3}\n', ("bad.jsonl line 2", "response", "a number")),
    "empty": (b"", ("bad.jsonl is empty",)),
    "blank lines only": (b"\n\n", ("bad.jsonl is empty",)),
    "truncated gzip": (gzip.compress(GOOD * 50)[:-9], ("bad.jsonl is cut short", "again")),
    "binary": (b"\x7fELF\x00\x01\x02" * 20, ("bad.jsonl is a binary file", "one object per line")),
    "not UTF-8": (GOOD + b'{"prompt": "\xff", "response": "b"}\n', ("bad.jsonl line 2", "not UTF-8")),
    "Parquet": (b"PAR1" * 10, ("bad.jsonl is a Parquet file", "pool=parquet")),
    "array": (b'[{"prompt": "a", "response": "b"}', ("bad.jsonl is not valid JSON", "the array does not end")),
}

# overrides -> what the error line must hold
BAD_OVERRIDES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    # keys
    (("selecton.fraction=0.1",), ("selecton.fraction", "did you mean selection.fraction?")),
    (("pool.pth=x",), ("pool.pth", "did you mean pool.path?")),
    (("saliency.num_layer=3",), ("saliency.num_layer:", "did you mean saliency.num_layers?")),
    (("seeed=1",), ("seeed", "did you mean seed?")),
    (("fraction=0.1",), ("fraction", "warmup.fraction or selection.fraction")),
    (("+typo=1",), ("typo: no such key",)),
    (("++seeed=1",), ("seeed: no such key; did you mean seed?",)),
    (("+pool.pth=x",), ("pool.pth: no such key; did you mean pool.path?",)),
    (("+poolr=mean",), ("poolr: no such key; did you mean pooler?",)),
    (("+seed=1",), ("+seed", "leave the plus sign out")),
    (("method.foo=1",), ("method.foo", "method=trim has no such key")),
    (("+trainer.acelerator=cpu",), ("trainer.acelerator", "did you mean trainer.accelerator?")),
    (("trainer.acelerator=cpu",), ("trainer.acelerator", "did you mean trainer.accelerator?")),
    (("hydra.foo=1",), ("hydra.foo: no such key",)),
    (("+hydra.swep.dir=x",), ("hydra.swep: no such key; did you mean hydra.sweep?",)),
    (("++hydra.run.dri=x",), ("hydra.run.dri: no such key; did you mean hydra.run.dir?",)),
    # options and groups
    (("pooler=meen",), ("pooler=meen", "has max, mean, mean_max,", "did you mean pooler=mean?")),
    (("pooler=median_absolute",), ("pooler=median_absolute", "pooler has max, mean,")),
    (("hydra/launcher=nope",), ("hydra/launcher=nope", "hydra/launcher has basic")),
    (("poolr=mean",), ("poolr: no such key; did you mean pooler?",)),
    (("experiment=nope",), ("experiment=nope", "experiment has budget_curve, demo")),
    (("method.name=tirm",), ("method.name=tirm", "trim")),
    (("scope=respnse",), ("scope=respnse", "all, prompt, response", "did you mean response?")),
    (("pool=null",), ("Config group override must be",)),
    # values
    (("seed=abc",), ("seed=abc: must be a whole number",)),
    (("seed=null",), ("seed=null: must be a whole number",)),
    (("seed=-1",), ("seed=-1: must be at least 0",)),
    (("seed=99999999999999999999",), ("seed=", "must be at most 4294967295")),
    (("max_length=1.5",), ("max_length=1.5: must be a whole number",)),
    (("max_length=0",), ("max_length=0: must be at least 1",)),
    (("model.trust_remote_code=maybe",), ("model.trust_remote_code=maybe: must be true or false",)),
    (("warmup.lora_targets=q_proj",), ("warmup.lora_targets=q_proj: must be auto, all-linear or a list of names",)),
    (("warmup.lora_targets=[]",), ("warmup.lora_targets=[]: must be auto, all-linear or a list of names",)),
    (("pool.where=abc",), ("pool.where=abc: must be a mapping",)),
    (("selection.fraction=abc",), ("selection.fraction=abc: must be a number or null",)),
    (("selection.fraction=0",), ("selection.fraction=0", "must be above 0")),
    (("selection.fraction=1.5",), ("selection.fraction=1.5: must be at most 1",)),
    (("selection.fraction=-0.1",), ("selection.fraction=-0.1: must be above 0",)),
    (("selection.fraction=nan",), ("selection.fraction=nan: must be a finite number",)),
    (("selection.count=41",), ("selection.count=41: the pool has only 40 records", "at most 40")),
    (
        ("selection.fraction=0.1", "selection.count=3"),
        ("selection.fraction=0.1 and selection.count=3", "give one of them"),
    ),
    (("saliency.num_layers=9",), ("saliency.num_layers=9", "has only 4 layers", "at most 4")),
    (("seed=${nope}",), ("seed: Interpolation key 'nope' not found",)),
    (("pool.path=???",), ("pool.path: a value is needed",)),
    # the override itself
    (("pool.path='abc",), ("pool.path='abc: not an override", "quotes")),
    (("pool.path=[a",), ("pool.path=[a: not an override", "quotes")),
    (("pool.path",), ("pool.path: not an override; write key=value",)),
    (("pooler=mean,max",), ("pooler=mean,max: several values; add -m",)),
    # devices
    (("trainer.accelerator=abacus",), ("trainer.accelerator=abacus",)),
    (("trainer.devices=0",), ("trainer.devices=0",)),
    (("trainer.devices=many",), ("trainer.devices=many",)),
    # inputs
    (("pool.path=nope.jsonl",), ("pool.path=nope.jsonl does not exist",)),
    (("pool.path=.",), ("pool.path=. is a directory",)),
    (("target.path=nope.jsonl",), ("target.path=nope.jsonl does not exist",)),
    (("target.group_field=nope",), ("target.group_field=nope", "targets.jsonl line 1", "fields: id, prompt")),
    (("pool.id_field=nope",), ("pool.id_field=nope", "pool.jsonl line 1", "fields: id, prompt")),
    (("pool.where.topik=a",), ("topik", "fields: id, prompt, response, subtask")),
    (("model.path=/no/such",), ("model.path=/no/such: no such directory",)),
    (("model.path=.",), ("model.path=.: is no model directory", "config.json")),
    # places
    (("paths.output_dir=a_file/x",), ("paths.output_dir=a_file/x", "Not a directory", "can write to")),
    (("paths.output_dir=a_file",), ("paths.output_dir=a_file", "File exists", "can write to")),
    (("paths.store_dir=a_file/x",), ("paths.store_dir=a_file/x", "Not a directory", "can write to")),
    (("hydra.run.dir=a_file/x",), ("a_file/x: Not a directory", "hydra.run.dir")),
    # flags
    (("--foo",), ("unrecognized arguments: --foo", "--hydra-help")),
    (("--cfg", "jb"), ("'jb'", "job")),
    (("--multirun", "--cfg", "job"), ("Only one of", "--multirun")),
    (("-m", "pooler=mean,max"), ("put flags such as -m before",)),
]


def assert_one_line(outcome: Outcome, directory: Path, *fragments: str) -> None:
    """Exit code 2, nothing but the error line on standard error, and no result files."""
    assert outcome.code == 2, outcome
    assert outcome.complaints == [outcome.last], outcome.err
    assert outcome.last.startswith("error: ")
    for fragment in fragments:
        assert fragment in outcome.last
    assert "Traceback" not in outcome.out + outcome.err
    assert final_files(directory) == []


@pytest.mark.parametrize("name", BAD_POOLS)
def test_bad_pool(name: str, run: Run, inputs: Inputs, tmp_path: Path) -> None:
    content, fragments = BAD_POOLS[name]
    (tmp_path / "bad.jsonl").write_bytes(content)
    assert_one_line(run(*inputs.arguments, "pool.path=bad.jsonl"), tmp_path, "pool.path=bad.jsonl", *fragments)


def test_bad_target(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"")
    assert_one_line(run(*inputs.arguments, "target.path=bad.jsonl"), tmp_path, "target.path=bad.jsonl is empty")


def test_target_without_scoped_tokens(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "mute.jsonl").write_bytes(b'{"prompt": "a question", "response": ""}\n')
    outcome = run(*inputs.arguments, "target.path=mute.jsonl", "scope=response", "warmup=none")
    assert_one_line(outcome, tmp_path, "target: no token of the target set is in scope=response", "another scope")


@pytest.mark.parametrize(("overrides", "fragments"), BAD_OVERRIDES, ids=[" ".join(case) for case, _ in BAD_OVERRIDES])
def test_bad_override(
    overrides: tuple[str, ...], fragments: tuple[str, ...], run: Run, inputs: Inputs, tmp_path: Path
) -> None:
    (tmp_path / "a_file").touch()
    assert_one_line(run(*inputs.arguments, *overrides), tmp_path, *fragments)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("pool=jsonl",), "error: pool=jsonl needs pool.path=FILE"),
        (("target=parquet",), "error: target=parquet needs target.path=FILE"),
        (("model=hf",), "error: model.path: a value is needed; give model.path=..."),
    ],
)
def test_option_that_needs_a_path(
    overrides: tuple[str, ...], line: str, run: Run, inputs: Inputs, tmp_path: Path
) -> None:
    given = [argument for argument in inputs.arguments if argument.partition(".")[0] != overrides[0].partition("=")[0]]
    outcome = run(*given, *overrides)
    assert_one_line(outcome, tmp_path)
    assert outcome.last == line


def test_hub_model_without_network(run: Run, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    outcome = run(*inputs.arguments, "model.path=nobody/no-such-model")
    assert_one_line(outcome, tmp_path, "model.path=nobody/no-such-model", "model.path=DIR")


def test_gpu_where_there_is_none(run: Run, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = run(*inputs.arguments, "trainer=gpu")
    assert_one_line(outcome, tmp_path, "trainer.accelerator=gpu", "choose what this machine has, or trainer=auto")
    # a method without a model needs no device
    assert run(*inputs.arguments, "trainer=gpu", "method=random").code == 0


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (("seeed=1,2",), "seeed: no such key; did you mean seed?"),
        (("pooler=mean,meen",), "pooler=meen: no such option"),
        (("+typo=1,2",), "typo: no such key"),
        (("seed=1,abc",), "seed=abc: must be a whole number"),
        (("selection.fraction=1.5,2",), "selection.fraction=1.5: must be at most 1"),
        (("pool.path=nope.jsonl", "seed=1,2"), "pool.path=nope.jsonl does not exist"),
        (("hydra.sweep.dir=a_file/x", "seed=1,2"), "a_file/x: Not a directory"),
        (("seed='1,2",), "seed='1,2: not an override"),
    ],
)
def test_multirun(overrides: tuple[str, ...], fragment: str, run: Run, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    outcome = run("-m", *inputs.arguments, *overrides)
    assert outcome.code == 2
    assert outcome.last.startswith("error: ")
    assert fragment in outcome.last
    assert "Traceback" not in outcome.out + outcome.err
    assert final_files(tmp_path) == []


def test_other_jobs_of_a_multirun_go_on(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    outcome = run("-m", *inputs.arguments, "method=random", "hydra.sweep.dir=sweep", "selection.count=50,2")
    assert (outcome.code, outcome.last) == (
        2,
        "error: selection.count=50: the pool has only 40 records; ask for at most 40",
    )
    assert "ERROR   this job failed: selection.count=50" in outcome.out
    assert final_files(tmp_path / "sweep" / "0") == []
    assert "coreset.jsonl" in final_files(tmp_path / "sweep" / "1")


def test_disk_full(run: Run, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out/scores.parquet")

    monkeypatch.setattr(trim_lightning.pipeline.select, "write_scores", fill)
    outcome = run(*inputs.arguments, "method=random")
    assert_one_line(outcome, tmp_path, "out/scores.parquet: No space left on device", "free space")


def test_failure_while_writing_leaves_no_result(
    run: Run, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tear(pool: object, row: int) -> bytes:
        raise UserError("pool.path=pool.jsonl has changed since it was read: run again")

    monkeypatch.setattr("trim_lightning.records.record_file.RecordFile.line", tear)
    monkeypatch.setattr("trim_lightning.records.record_file.RecordFile.id", lambda pool, row: str(row))
    monkeypatch.setattr("trim_lightning.pipeline.select.selection_summary", lambda *rest: "")
    outcome = run(*inputs.arguments, "method=random", "paths.output_dir=out")
    assert (outcome.code, outcome.last) == (2, "error: pool.path=pool.jsonl has changed since it was read: run again")
    # the scores were whole; the coreset was not
    assert final_files(tmp_path / "out") == ["scores.parquet"]


def test_internal_failure(run: Run, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(settings: object, command: str) -> None:
        raise RuntimeError("the sky fell")

    monkeypatch.setattr(trim_lightning.pipeline.select, "select", break_down)
    outcome = run(*inputs.arguments)
    assert outcome.code == 1
    assert "Traceback (most recent call last)" in outcome.err
    assert "RuntimeError: the sky fell" in outcome.err
    assert outcome.last == "error: internal failure (RuntimeError); the traceback above says where"


def test_mistake_that_a_library_wrapped(run: Run, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap(settings: object, command: str) -> None:
        try:
            raise UserError("pool.path=x: mend it")
        except UserError as error:
            raise RuntimeError("a worker died") from error

    monkeypatch.setattr(trim_lightning.pipeline.select, "select", wrap)
    outcome = run(*inputs.arguments)
    assert (outcome.code, outcome.last) == (2, "error: pool.path=x: mend it")
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("prefix", [(), ("-m",)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_interrupt(
    prefix: tuple[str, ...], number: signal.Signals, run: Run, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(settings: object, command: str) -> None:
        signal.raise_signal(number)
        raise AssertionError("the signal did not end the run")

    monkeypatch.setattr(trim_lightning.pipeline.select, "select", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        outcome = run(*prefix, *inputs.arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.code == 130
    assert outcome.last == "interrupted: finished work is kept; the same command goes on from there"
    assert "Traceback" not in outcome.err


TERMINATE_AFTER_TWO_BATCHES = """
import os, signal, sys
from trim_lightning.cli.hydra_app import select_main
from trim_lightning.engine.modules import ScoringPass

plain = ScoringPass.predict_step

def interrupted(self, batch, batch_idx):
    if batch_idx == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(self, batch, batch_idx)

ScoringPass.predict_step = interrupted
sys.exit(select_main())
"""


@pytest.mark.slow
def test_terminated_in_the_middle_and_run_again(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    overrides = [*inputs.arguments, "paths.store_dir=store", "scoring.tokens_per_batch=512", "paths.output_dir=out"]
    killed = run_process(sys.executable, "-c", TERMINATE_AFTER_TWO_BATCHES, *overrides, cwd=tmp_path)
    assert killed.code == 130, killed.err
    assert killed.last.startswith("interrupted: finished work is kept")
    assert "Traceback" not in killed.err
    assert final_files(tmp_path / "out") == []
    assert run(*overrides).code == 0
    stages = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]
    cached = {stage: record["cached"] for stage, record in stages.items()}
    assert cached == {"tokenize": True, "warmup": True, "fingerprint": True, "score": False, "select": False}


@pytest.mark.parametrize(
    ("command", "overrides", "line"),
    [
        ((CONSOLE_SCRIPT,), ("pool=jsonl", "pool.path=nope.jsonl"), "error: pool.path=nope.jsonl does not exist"),
        ((CONSOLE_SCRIPT,), ("selecton.fraction=0.1",), "did you mean selection.fraction?"),
        ((CONSOLE_SCRIPT,), ("-m", "max_length=0,0"), "error: max_length=0: must be at least 1"),
        ((CONSOLE_SCRIPT,), ("--foo",), "error: unrecognized arguments: --foo"),
        ((sys.executable, ROOT / "select.py"), ("seed=abc",), "error: seed=abc: must be a whole number"),
    ],
)
def test_as_a_process_elsewhere(
    command: tuple[str | Path, ...], overrides: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    outcome = run_process(*command, *overrides, cwd=tmp_path)
    assert outcome.code == 2
    assert outcome.last.startswith("error: ")
    assert line in outcome.last
    assert "Traceback" not in outcome.out + outcome.err
    assert final_files(tmp_path) == []


def test_a_library_that_ends_the_process(run: Run, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: object) -> Callable[[object], None]:
        def task(settings: object, command: str) -> None:
            sys.exit(code)  # type: ignore[arg-type]

        return task

    for code, expected in [(None, 0), (0, 0), (1, 1), ("bad luck", 1)]:
        monkeypatch.setattr(trim_lightning.pipeline.select, "select", leave(code))
        assert run(*inputs.arguments).code == expected


def test_message_is_brought_onto_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail("first\nsecond  third") == 2
    assert capsys.readouterr().err == "error: first second third\n"


@pytest.mark.parametrize(
    ("chosen", "mean"), [([0, 1, 2], 2.0), ([1], None), ([], None)], ids=["some", "unscored", "nothing"]
)
@pytest.mark.filterwarnings("error")
def test_records_without_a_score_are_no_part_of_the_mean(chosen: list[int], mean: float | None) -> None:
    scores = SimpleNamespace(score=np.array([1.0, np.nan, 3.0], dtype=np.float32))
    found = SimpleNamespace(scores=scores, chosen=np.array(chosen, dtype=np.int64))
    assert mean_score(cast("Selection", found)) == mean


def test_a_job_can_be_sent_to_another_process() -> None:
    job = pickle.loads(pickle.dumps(Job(select_task)))
    assert job.task is select_task
    assert job.__name__ == "select_task"
