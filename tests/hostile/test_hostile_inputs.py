"""Files, models, stores and configs made to do harm: each ends in the one clear error, or in a valid result."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import json
import logging
import math
import os
import pickle
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_targets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composing import compose_select
from tiny_models import build_tiny_model, build_tiny_tokenizer
from trim_lightning.cli import exits
from trim_lightning.cli.explain import main as explain_main
from trim_lightning.cli.export import main as export_main
from trim_lightning.compare.files import run_rows, write_rows
from trim_lightning.compare.report import compare
from trim_lightning.errors import UserError
from trim_lightning.files.json_files import MOST_NESTED
from trim_lightning.methods.base import load_selector
from trim_lightning.models.adapter import check_adapter
from trim_lightning.models.load import load_model, load_tokenizer
from trim_lightning.models.source import find_model
from trim_lightning.privacy.keys import LogFormatter
from trim_lightning.records import file_formats, indexing, record_file
from trim_lightning.records.record import Turn
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.sources import open_records
from trim_lightning.runs.find import find_runs
from trim_lightning.runs.reopened import settings_from
from trim_lightning.runs.run import read_runs
from trim_lightning.settings.guard import check_instantiated, guard_hydra
from trim_lightning.settings.schema import ModelSettings, SourceSettings
from trim_lightning.store import StageKey, Store
from trim_lightning.store.receipt import RECEIPT, seal_of
from trim_lightning.tokens import bounds
from trim_lightning.tokens.rendering import ChatRenderer, RenderError

GOOD = b'{"prompt": "a question", "response": "an answer"}\n'
Read = Callable[..., RecordFile]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Opens bytes as a pool."""

    def opened(content: bytes, name: str = "pool.jsonl", source: str = "jsonl", **keys: Any) -> RecordFile:
        path = tmp_path / name
        path.write_bytes(content)
        wanted = SourceSettings(source=source, path=str(path), **keys)
        return open_records(wanted, what="pool", seed=0, spool=Store(tmp_path / "store").spool)

    return opened


def refusal(task: Callable[[], Any]) -> str:
    """The one line of what must be refused."""
    with pytest.raises(UserError) as caught:
        task()
    assert str(caught.value).strip()
    return str(caught.value)


def trim_select(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [Path(sys.executable).with_name("trim-select"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


# --- JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [MOST_NESTED, 1_000, 100_000])
def test_deep_nesting_is_refused(depth: int, read: Read) -> None:
    bomb = b'{"prompt": ' + b"[" * depth + b"]" * depth + b', "response": "b"}\n'
    assert "line 2 is not valid JSON (nested too deeply" in refusal(lambda: read(GOOD + bomb))


def test_nesting_that_is_still_read(read: Read) -> None:
    lists = b"[" * (MOST_NESTED - 1) + b"]" * (MOST_NESTED - 1)
    assert len(read(GOOD + b'{"prompt": "a", "response": "b", "more": ' + lists + b"}\n")) == 2


def test_depth_that_can_be_parsed_is_never_a_traceback(read: Read) -> None:
    for depth in range(700, 1000, 7):
        nested = b'{"type":' * depth + b"1" + b"}" * depth
        line = b'{"messages": [{"role": "user", "content": [' + nested + b"]}]}\n"
        refusal(lambda line=line: read(line))


def test_numbers_of_any_size(read: Read) -> None:
    digits = b"9" * 5000
    longest = GOOD + b'{"prompt": "a", "response": "b", "id": ' + digits + b"}"
    assert "integer string conversion" in refusal(lambda: read(longest))
    records = read(GOOD[:-2] + b', "id": 1e400, "n": NaN, "m": -Infinity}\n')
    assert records.id(0) == "Infinity"


def test_the_last_of_duplicate_keys_counts(read: Read) -> None:
    records = read(b'{"prompt": "first", "prompt": "second", "response": "b"}\n')
    assert records.record(0).turns[0].content == "second"


def test_lone_surrogates_and_nul_become_text(read: Read) -> None:
    record = read(b'{"prompt": "\\ud800 \\u0000", "response": "\\udfff", "id": "\\ud800"}\n').record(0)
    assert record.id == "\ufffd"
    assert [turn.content for turn in record.turns] == ["\ufffd \x00", "\ufffd"]


def test_raw_nul_and_bad_utf8_are_refused(read: Read) -> None:
    assert "binary file" in refusal(lambda: read(b'{"prompt": "\x00", "response": "b"}\n'))
    later = GOOD * 200 + b'{"prompt": "\x00", "response": "b"}\n'
    assert "line 201 is not valid JSON" in refusal(lambda: read(later))
    assert "not UTF-8" in refusal(lambda: read(GOOD + b'{"prompt": "\xff", "response": "b"}\n'))
    assert "not UTF-8" in refusal(lambda: read(GOOD + b'{"prompt": "\xed\xa0\x80", "response": "b"}\n'))


def test_a_line_beyond_the_limit_is_refused(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (record_file, indexing, file_formats):
        monkeypatch.setattr(module, "MOST_LINE_BYTES", 100)
    assert len(read(GOOD * 9)) == 9
    longer = GOOD + b'{"prompt": "' + b"a" * 100 + b'", "response": "b"}\n' + GOOD
    assert "line 2 is longer than" in refusal(lambda: read(longer))
    assert "longer than" in refusal(lambda: read(gzip.compress(longer), "pool.jsonl.gz"))
    assert len(read(gzip.compress(GOOD * 50_000), "pool.jsonl.gz")) == 50_000


def test_an_input_that_grows_too_much_is_refused(read: Read, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(file_formats, "_FREE_GROWTH", 1 << 20)
    bomb = gzip.compress(GOOD * 200_000)
    assert "unpacks to more than 200 times its size" in refusal(lambda: read(bomb, "pool.jsonl.gz"))
    out = io.BytesIO()
    column = pa.array(["the same text " * 20]).take(pa.array([0] * 20_000))
    pq.write_table(pa.table({"prompt": column, "response": column}), out)
    assert len(out.getvalue()) < 50_000
    assert "unpacks to more than" in refusal(lambda: read(out.getvalue(), "pool.parquet", "parquet"))
    assert not list((tmp_path / "store").glob("p*/*/*"))  # nothing of either stays


BOUNDED = """
import resource, sys
from trim_lightning.records.sources import open_records
from trim_lightning.errors import UserError
from trim_lightning.settings.schema import SourceSettings
from trim_lightning.store import Store
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (200 << 20),) * 2)
try:
    open_records(SourceSettings(source="jsonl", path=sys.argv[1]), what="pool", seed=0, spool=Store(sys.argv[2]).spool)
except UserError as error:
    print(error)
"""


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["plain", "gz", "many lines"])
def test_a_gigabyte_stays_within_two_hundred_megabytes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("pool.jsonl" if kind == "plain" else "pool.jsonl.gz")
    if kind == "plain":
        with path.open("wb") as file:  # a hole of the file system, read as NUL bytes
            file.write(b'{"prompt": "' + b"a" * 5000)
            file.truncate(1 << 30)
    else:
        block = b"a" * (1 << 20) if kind == "gz" else GOOD * 20_000
        with gzip.open(path, "wb", compresslevel=6) as file:
            for _ in range((1 << 30) // len(block)):
                file.write(block)
    command = [sys.executable, "-c", BOUNDED, path, tmp_path / "store"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("longer than 16 MiB" if kind == "plain" else "times its size") in done.stdout


# --- Parquet ------------------------------------------------------------------------------------------------


def parquet(**columns: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": ["c", "d"], **columns}), out)
    return out.getvalue()


def test_values_that_python_has_no_object_for(read: Read) -> None:
    for kind in (pa.timestamp("us"), pa.duration("s"), pa.time64("us")):
        far = parquet(far=pa.array([2**61, -(2**61)], pa.int64()).cast(kind))
        assert "not a readable Parquet file" in refusal(lambda far=far: read(far, "pool.parquet", "parquet"))
    zone = pa.array([1, 2], pa.timestamp("us", tz="../../nowhere"))
    assert "not a readable Parquet file" in refusal(lambda: read(parquet(zone=zone), "pool.parquet", "parquet"))


def test_lying_metadata_and_damaged_pages(read: Read) -> None:
    out = io.BytesIO()
    rows = 12_345  # as a varint f2 c0 01
    pq.write_table(pa.table({"prompt": ["a"] * rows, "response": ["b"] * rows}), out)
    sound = out.getvalue()
    footer = len(sound) - 8 - struct.unpack("<I", sound[-8:-4])[0]
    assert sound.count(b"\xf2\xc0\x01", footer) >= 2
    lying = sound[:footer] + sound[footer:].replace(b"\xf2\xc0\x01", b"\xfe\xff\x7f")
    for name, content in {
        "rows": lying,
        "pages": sound[:4] + bytes(footer - 4) + sound[footer:],
        "footer length": sound[:-8] + b"\xff\xff\xff\x7fPAR1",
        "head alone": b"PAR1" + bytes(100) + b"PAR1",
    }.items():
        told = refusal(lambda content=content: read(content, "pool.parquet", "parquet"))
        assert "not a readable Parquet file" in told, name


# --- what a config may make --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+x._target_=os.system", "x._target_"),
        ("method._target_=os.system", "method._target_"),
        ("trainer._target_=builtins.exec", "trainer._target_"),
        ("pool.where={a: {_target_: os.system}}", "pool.where.a._target_"),
        ("+hydra.callbacks.a={_target_: pathlib.Path}", "hydra.callbacks.a._target_"),
        ("+hydra.callbacks.a={_target_: trim_lightning.cli.hydra_app.os.system}", "hydra.callbacks.a._target_"),
        ("+hydra.callbacks.a={_target_: hydra_plugins.trim_launcher.launcher.logging.os.system}", "hydra.callbacks"),
        ("hydra.launcher._target_=subprocess.Popen", "hydra.launcher._target_"),
        ("hydra.sweeper._target_=subprocess.Popen", "hydra.sweeper._target_"),
        ("+hydra.job_logging.handlers.a={class: subprocess.Popen}", "hydra.job_logging.handlers.a.class"),
        ("+hydra.hydra_logging.formatters.a={class: os.system}", "hydra.hydra_logging.formatters.a.class"),
        ("+hydra.job_logging.handlers.a={class: logging.StreamHandler, stream: ext://os.environ}", "handlers.a.stream"),
        ("+hydra.job_logging.handlers.a={class: '${seed}'}", "hydra.job_logging.handlers.a.class"),
        ("+hydra.job_logging.handlers.a=${pool.where}", "hydra.job_logging.handlers.a="),
    ],
)
def test_nothing_foreign_is_made_from_a_config(override: str, key: str, tmp_path: Path) -> None:
    done = trim_select(tmp_path, override)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, last.startswith("error: ")) == (2, True), done.stderr[-2000:]
    assert key in last
    assert "Traceback" not in done.stderr


def test_a_factory_of_log_lines_is_found_where_no_override_can_write_it() -> None:
    config = {"hydra": {"job_logging": {"filters": {"a": {"()": "os.system"}}}}}
    assert "hydra.job_logging.filters.a.()=os.system" in refusal(lambda: check_instantiated(config))
    handlers = {"a": {"class": "logging.FileHandler", "stream": "ext://sys.stdout"}}
    check_instantiated({"hydra": {"job_logging": {"handlers": handlers}}})


def test_an_experiment_file_from_outside_makes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "theirs" / "experiment"
    folder.mkdir(parents=True)
    (folder / "evil.yaml").write_text(
        textwrap.dedent(
            f"""\
            # @package _global_
            hydra:
              callbacks:
                a:
                  _target_: pathlib.Path.touch
                  self: {tmp_path / "made"}
              job_logging:
                filters:
                  b:
                    (): subprocess.getoutput
                    cmd: touch {tmp_path / "made"}
            """
        )
    )
    done = trim_select(tmp_path, "--config-dir", tmp_path / "theirs", "experiment=evil")
    assert done.returncode == 2
    assert "error: hydra.callbacks.a._target_=pathlib.Path.touch" in done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "override",
    ["seed=1", "hydra/launcher=joblib", "hydra/launcher=submitit_slurm", "hydra/launcher=basic",
     "hydra/launcher@hydra.launcher.inner=joblib", "hydra/job_logging=stdout", "hydra/job_logging=disabled"],
)  # fmt: skip
def test_what_the_project_itself_uses_is_allowed(override: str) -> None:
    guard_hydra()
    compose_select(["model=hf", "model.path=m", "paths.output_dir=x", override])


def test_optuna_is_allowed() -> None:
    sampler = {"_target_": "optuna.samplers.TPESampler"}
    sweeper = {"_target_": "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper", "sampler": sampler}
    check_instantiated({"hydra": {"sweeper": sweeper}})


def test_nothing_is_looked_up_for_a_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "canary")
    pool = {"source": "jsonl", "path": "x ${oc.env:A_SECRET} ${seed}"}
    config = {"model": {"path": "m"}, "method": {"name": "random"}, "seed": 3, "pool": pool}
    assert settings_from(config).pool.path == "x ${oc.env:A_SECRET} ${seed}"
    assert "canary" not in refusal(lambda: load_selector({"name": "dsir", "buckets": "${oc.env:A_SECRET}"}))
    assert "canary" not in refusal(lambda: load_selector({"name": "${oc.env:A_SECRET}"}))


# --- run directories ---------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished selection's directory."""
    hostile_targets.make_run(tmp_path / "run")
    return tmp_path / "run"


def change(run: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    edit(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("config", {"method": {"name": ["a"]}}), ("config", {"method": {}}), ("config", {"seed": {}}),
        ("config", {"model": {"path": 3}}), ("counts", {"selected": True}), ("counts", {"selected_tokens": "9"}),
        ("stages", {"score": {"seconds": "long"}}), ("stages", {"score": []}), ("inputs", {"pool": [1]}),
    ],
)  # fmt: skip
def test_a_foreign_manifest_is_a_broken_run(part: str, values: dict[str, Any], run: Path) -> None:
    assert len(read_runs(find_runs([run])[0])[0]) == 1
    change(run, lambda manifest: manifest[part].update(values))
    runs, broken = read_runs(find_runs([run])[0])
    assert not runs or all(item.method != ["a"] for item in runs)
    assert len(runs) + len(broken) == 1


@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-this-name/x", "a\0b", "/"])
def test_a_coreset_path_that_cannot_be_a_file(path: str, run: Path) -> None:
    """A training run's manifest names the file that it was given."""
    (run / "metrics.json").write_text("{}")

    def edit(manifest: dict[str, Any]) -> None:
        manifest["config"].update(coreset={"path": path}, train={"model": None}, evaluation={})
        manifest["inputs"].update(coreset={"rows": 3})

    change(run, edit)
    runs, broken = read_runs(find_runs([run])[0])
    assert len(runs) + len(broken) == 1
    assert all(item.coreset.file is None for item in runs)


def test_half_characters_in_a_manifest_can_be_written_again(run: Path, tmp_path: Path) -> None:
    change(run, lambda manifest: manifest["config"]["method"].update(note="\ud800"))
    assert export_main([str(run), "--format", "messages", "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "export.json").read_text())["method"]["note"] == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(("number", "written"), [(2**70, float(2**70)), (10**400, math.inf), (-(10**400), -math.inf)])
def test_a_number_beyond_every_column(number: int, written: float, run: Path, tmp_path: Path) -> None:
    change(run, lambda manifest: manifest["config"].update(seed=number))
    report = compare([run], all_pairs=False, samples=100, seed=0)
    csv, parquet = write_rows(run_rows(report), tmp_path / "compare")
    assert csv.stat().st_size
    assert written in pq.read_table(parquet).to_pylist()[0].values()


def test_bombs_in_a_manifest_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = b'{"config": ' + b"9" * 5000 + b"}"
    for bomb in (b"[" * 100_000, long, b"\xff", b"[]", b'{"config": []}', b'{"config": {"pool": 3}}'):
        (run / "manifest.json").write_bytes(bomb)
        assert not read_runs(find_runs([run])[0])[0]
        assert export_main([str(run), "--format", "messages"]) == 2
        assert explain_main([str(run), "--row", "0", "--store", str(tmp_path)]) == 2
    with (run / "manifest.json").open("wb") as file:
        file.truncate(1 << 30)
    assert "more than 64 MiB" in read_runs(find_runs([run])[0])[1][0][1]
    assert "Traceback" not in capsys.readouterr().err


def test_folders_named_with_other_digits_are_no_jobs(run: Path, tmp_path: Path) -> None:
    (tmp_path / "²").mkdir()
    (tmp_path / "٣").mkdir()
    assert [found.directory for found in find_runs([tmp_path])[0]] == [run]


def test_a_manifest_names_no_entry_outside_the_store(run: Path, tmp_path: Path) -> None:
    from trim_lightning.runs.reopened import open_run

    change(run, lambda manifest: manifest["stages"].update(score={"key": "../../../etc"}, warmup={"key": "/etc"}))
    opened = open_run(run, tmp_path)
    assert opened.stage("score") is None
    assert opened.stage("warmup") is None


def test_a_manifest_cannot_let_a_model_run_code(run: Path, tmp_path: Path) -> None:
    from trim_lightning.runs.reopened import open_run

    change(run, lambda manifest: manifest["config"]["model"].update(trust_remote_code=True, path=str(tmp_path)))
    assert "add --trust-remote-code" in refusal(lambda: open_run(run, tmp_path).source)


def test_exports_go_where_they_are_told_and_nowhere_else(run: Path, tmp_path: Path) -> None:
    change(run, lambda manifest: manifest["config"]["pool"].update(name="../../x", path="/etc/passwd"))
    before = {path for path in tmp_path.rglob("*") if run not in path.parents}
    assert export_main([str(run), "--format", "alpaca"]) == 0
    assert {path for path in tmp_path.rglob("*") if run not in path.parents} == before
    assert {path.name for path in (run / "export" / "alpaca").iterdir()} == {
        "alpaca.jsonl", "dataset_info.json", "scores.jsonl", "export.json"
    }  # fmt: skip


def test_a_link_in_the_place_of_an_output_is_replaced_not_followed(run: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = run / "export" / "messages"
    folder.mkdir(parents=True)
    for name in ("messages.jsonl", "scores.jsonl", "export.json"):
        (folder / name).symlink_to(victim)
    assert export_main([str(run), "--format", "messages"]) == 0
    assert victim.read_text() == "mine"


# --- the store ---------------------------------------------------------------------------------------------

KEY = StageKey("score", 1, {"a": 1})


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """A sound entry with one file."""
    return Store(tmp_path / "store").get(KEY, lambda folder: (folder / "data").write_text("data") and None).path


def forge(entry: Path, **changes: Any) -> None:
    """A receipt that says something else under a valid seal."""
    receipt = json.loads((entry / RECEIPT).read_text()) | changes
    (entry / RECEIPT).write_text(json.dumps({**receipt, "seal": seal_of(receipt)}))


@pytest.mark.parametrize(
    "files",
    [
        [], None, {"data": None}, {"data": {"size": "4"}}, {"data": {"size": 4, "sha256": 3}},
        {"../../victim": {"size": 4, "sha256": "x"}}, {"/etc/passwd": {"size": 4, "sha256": "x"}},
        {"a\x00b": {"size": 4, "sha256": "x"}}, {"x" * 5000: {"size": 4, "sha256": "x"}}, {"": {"size": 4, "sha256": "x"}},
    ],
)  # fmt: skip
def test_a_forged_receipt_is_a_damaged_entry(files: Any, entry: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    forge(entry, files=files)
    assert Store(tmp_path / "store").find(KEY) is None
    assert not entry.exists()
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{}", b'{"files": {}, "facts": 3}', b"9" * 5000, b"\xff"])
def test_an_unreadable_receipt_is_a_damaged_entry(content: bytes, entry: Path, tmp_path: Path) -> None:
    (entry / RECEIPT).write_bytes(content)
    assert Store(tmp_path / "store").find(KEY) is None


def test_links_out_of_the_store_are_damage_and_what_they_lead_to_stays(entry: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "data").write_text("data")
    (entry / "data").unlink()
    (entry / "data").symlink_to(victim / "data")
    assert Store(tmp_path / "store").find(KEY) is None
    entry.symlink_to(victim)
    assert Store(tmp_path / "store").find(KEY) is None
    assert not entry.is_symlink()
    assert (victim / "data").read_text() == "data"
    assert not list((tmp_path / "store" / "partial").iterdir())


def test_a_receipt_that_is_a_pipe_does_not_hang(entry: Path, tmp_path: Path) -> None:
    (entry / RECEIPT).unlink()
    os.mkfifo(entry / RECEIPT)
    assert Store(tmp_path / "store").find(KEY) is None


# --- models ------------------------------------------------------------------------------------------------


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model."""
    return build_tiny_model("llama", tmp_path / "model")


def load(folder: Path, tmp_path: Path) -> None:
    import torch

    source = find_model(ModelSettings(path=str(folder)), Store(tmp_path / "store"))
    load_tokenizer(source)
    load_model(source, torch.float32)


def test_pickled_weights_are_not_opened(model: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Harm(made)))
    load(model, tmp_path)
    (model / "model.safetensors").unlink()
    assert "pickled weights" in refusal(lambda: load(model, tmp_path))
    assert not made.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_not_run(name: str, model: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (model / "theirs.py").write_text(f"from pathlib import Path\nPath({str(made)!r}).touch()\nclass A: pass\n")
    kinds = {"AutoConfig": "theirs.A", "AutoModelForCausalLM": "theirs.A", "AutoTokenizer": ["theirs.A", "theirs.A"]}
    config = json.loads((model / name).read_text()) | {"auto_map": kinds}
    if name == "tokenizer_config.json":
        config["tokenizer_class"] = "A"
    (model / name).write_text(json.dumps(config))
    # transformers takes its own class for a tokenizer, and ours refuses a model
    with pytest.raises(UserError) if name == "config.json" else contextlib.suppress(UserError):
        load(model, tmp_path)
    assert not made.exists()


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 1 << 62), struct.pack("<Q", 1 << 26) + b"{}", struct.pack("<Q", 5) + b"{[[[[",
        hostile_targets.adapter_bytes({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}, b"\0" * 8),
        hostile_targets.adapter_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                                       "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"\0" * 12),
        hostile_targets.adapter_bytes({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        hostile_targets.adapter_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"\0" * 8),
        hostile_targets.adapter_bytes(b"[" * 100_000, b""),
    ],
)  # fmt: skip
def test_tampered_safetensors_are_refused(header: bytes, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(header)
    assert "cannot be loaded" in refusal(lambda: load(model, tmp_path))
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(header)
    assert "corrupt" in refusal(lambda: check_adapter(folder))


def test_an_adapter_names_no_library(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"megatron_config": {}, "megatron_core": "antigravity"}')
    content = hostile_targets.adapter_bytes(hostile_targets.ADAPTER, hostile_targets.WEIGHTS)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    assert "library of its own" in refusal(lambda: check_adapter(tmp_path))


def test_a_config_of_a_billion_layers_is_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (model / "config.json").write_text(json.dumps(config))
    assert "no model has so many" in refusal(lambda: load(model, tmp_path))


# --- templates ---------------------------------------------------------------------------------------------

TURNS = [Turn("user", "a question"), Turn("assistant", "an answer")]


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_SECONDS", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert "takes more than" in refusal(lambda: ChatRenderer(build_tiny_tokenizer(), loop))
    slow = "{% for m in messages %}{{ m.content }}{% if 'trap' in m.content %}" + loop + "{% endif %}{% endfor %}"
    renderer = ChatRenderer(build_tiny_tokenizer(), slow)
    renderer.encode([TURNS], 100)
    assert "takes more than" in refusal(lambda: renderer.encode([[Turn("user", "trap"), *TURNS[1:]]], 100))


@pytest.mark.parametrize(
    "template", ["{{ 9 ** 9 ** 9 }}", "{% set x = 2**99999999 %}", "{% generation %}{{ 9**9 }}{% endgeneration %}"]
)
def test_a_template_computes_no_powers(template: str) -> None:
    assert "computes a power" in refusal(lambda: ChatRenderer(build_tiny_tokenizer(), template))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% for m in messages %}{{ m['content'].format.__globals__ }}{% endfor %}",
        "{{ namespace.__init__.__globals__ }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os.system('true') }}",
    ],
)  # fmt: skip
def test_a_template_reaches_nothing_of_python(template: str) -> None:
    (outcome,) = ChatRenderer(build_tiny_tokenizer(), template).encode([TURNS], 100)
    assert isinstance(outcome, RenderError)


# --- the terminal ------------------------------------------------------------------------------------------


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits.fail("pool.path=\x1b[2J\x1b]0;owned\x07 \x9b31m\u202e" + "a" * 100_000) == 2
    error = capsys.readouterr().err
    assert "error: pool.path=␛[2J␛]0;owned␇ ⟨U+009B⟩31m⟨U+202E⟩" in error
    assert len(error) < 3000
    record = logging.LogRecord("a", logging.WARNING, "", 0, "it says %s", ("\x1b[31mred",), None)
    assert LogFormatter("%(message)s").format(record) == "it says ␛[31mred"


def test_a_run_logs_with_the_careful_formatter() -> None:
    from omegaconf import OmegaConf

    folder = Path(__file__).resolve().parents[2] / "conf" / "hydra" / "default.yaml"
    simple = OmegaConf.load(folder).job_logging.formatters.simple
    module, _, name = simple["class"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is LogFormatter


# --- the fuzzer's own targets ------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("name", hostile_targets.TARGETS)
def test_any_bytes(name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_SECONDS", 1.0)
    task = hostile_targets.TARGETS[name](tmp_path_factory.mktemp(name))
    examples = hostile_targets.EXAMPLES[name]()
    for example in examples:
        task(example)

    @settings(max_examples=60 if name in ("overrides", "compare") else 400, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(examples), st.integers(0, 4096), st.binary(max_size=40), st.integers(0, 40))
    def changed(example: bytes, place: int, put: bytes, cut: int) -> None:
        place %= len(example) + 1
        task(example[:place] + put + example[place + cut :])

    changed()


@pytest.mark.faults
def test_a_short_run_of_the_fuzzer(tmp_path: Path) -> None:
    number = os.environ.get("TRIM_FUZZ_INPUTS", "20000")
    script = Path(__file__).with_name("fuzz.py")
    done = subprocess.run([sys.executable, script, "--inputs", number], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]
