"""Tracking: W&B offline with no key and no network, a run per job, what is in the run file; CSV; progress lines."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from cli.conftest import CONSOLE_SCRIPT, Inputs, Outcome, Run, run_process
from tiny_models import write_records
from trim_lightning.console.progress import LINE_SECONDS, ProgressLines, progress_bar
from trim_lightning.settings.schema import LoggerSettings
from trim_lightning.tracking.open import tracked
from trim_lightning.tracking.tracker import Tracker
from trim_lightning.tracking.wandb import has_wandb_key, wandb_mode

HEADER, BLOCK = 7, 32 * 1024


def transactions(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: a LevelDB log of `wandb_internal_pb2.Record`, checksums checked."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = HEADER, b""
    while place < len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, place)
        body = data[place + HEADER : place + HEADER + length]
        assert zlib.crc32(body, zlib.crc32(bytes([kind]))) == checksum
        parts += body
        place += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
    assert parts == b""


@dataclass
class WandbRun:
    """What a run file holds."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    run: Any = None
    exit_code: int | None = None
    kinds: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> WandbRun:
        """Gather the records of a file."""
        found = cls(path)
        for record in transactions(path):
            kind = record.WhichOneof("record_type")
            found.kinds.add(kind)
            if kind == "run":
                found.run = record.run
                found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                found.metrics |= {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
            elif kind == "artifact":
                found.artifacts[record.artifact.type] = record.artifact
            elif kind == "exit":
                found.exit_code = record.exit.exit_code
        return found


class Listener:
    """A local port that stands for every proxy and for the W&B server, and notes whoever calls."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            caller.settimeout(5)
            try:
                self.calls.append(caller.recv(300))
            except OSError:
                self.calls.append(b"?")
            caller.close()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


@dataclass(frozen=True)
class Sweep:
    """A finished offline multirun of two poolers, with everything that could leak planted."""

    outcome: Outcome
    home: Path
    directory: Path
    calls: list[bytes]

    def runs(self) -> list[WandbRun]:
        """The run of each job, read from its output directory."""
        paths = [list((self.directory / job).rglob("*.wandb")) for job in ("0", "1")]
        assert [len(found) for found in paths] == [1, 1]
        return [WandbRun.read(found[0]) for found in paths]


SECRETS = {"HF_TOKEN": "hf_canary0123456789", "AWS_SECRET_ACCESS_KEY": "aws-canary"}


@pytest.fixture(scope="module")
def sweep(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Run it as a user without a key and without a network would."""
    root = tmp_path_factory.mktemp("sweep")
    home = root / "home" / "jane"
    home.mkdir(parents=True)
    write_records(home / "pool.jsonl", 16, seed=6)
    listener = Listener()
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith("WANDB")
    }
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    environment |= dict.fromkeys((*proxies, "WANDB_BASE_URL"), listener.url)
    environment |= {**SECRETS, "HOME": str(home)}
    outcome = run_process(
        CONSOLE_SCRIPT, "-m", *inputs.arguments, f"pool.path={home / 'pool.jsonl'}", "pooler=mean,max", "warmup=none",
        "logger=wandb", "hydra.sweep.dir=sweep/first", cwd=root, environment=environment,
    )  # fmt: skip
    listener.close()
    return Sweep(outcome, home, root / "sweep" / "first", listener.calls)


def test_offline_without_a_key(sweep: Sweep) -> None:
    assert sweep.outcome.code == 0, sweep.outcome.err
    assert sweep.outcome.complaints == []
    assert (
        sweep.outcome.out.count("W&B: logging offline; `wandb sync` uploads the run later") == 3
    )  # each job's, and the sweep's


def test_nobody_is_called(sweep: Sweep) -> None:
    assert sweep.calls == []


def test_a_run_for_each_job(sweep: Sweep) -> None:
    first, second = sweep.runs()
    assert first.run.run_id != second.run.run_id
    assert (first.exit_code, second.exit_code) == (0, 0)  # the first was closed, not left to the second
    assert {run.run.job_type for run in (first, second)} == {"select"}
    assert {run.run.project for run in (first, second)} == {"trim-lightning"}
    assert {run.run.run_group for run in (first, second)} == {"sweep/first"}
    assert [run.run.display_name for run in (first, second)] == ["first/0", "first/1"]


def test_a_run_for_the_sweep_holds_its_table(sweep: Sweep) -> None:
    (file,) = (sweep.directory / "wandb").rglob("*.wandb")
    run = WandbRun.read(file)
    assert (run.run.job_type, run.run.run_group, run.exit_code) == ("sweep", "sweep/first", 0)
    assert run.config["axes"] == {"pooler.name": ["mean", "max"]}
    assert run.metrics["sweep/runs"] == 2
    (table,) = (sweep.directory / "wandb").rglob("files/media/table/*.json")
    content = json.loads(table.read_text())
    place = {name: number for number, name in enumerate(content["columns"])}
    assert [row[place["config/pooler.name"]] for row in content["data"]] == ["mean", "max"]
    assert content["data"][0][place["overlap/1"]] == content["data"][1][place["overlap/0"]]


def test_metrics_in_the_run(sweep: Sweep) -> None:
    for job, run in zip(("0", "1"), sweep.runs(), strict=True):
        manifest = json.loads((sweep.directory / job / "manifest.json").read_text())
        for name, value in manifest["counts"].items():
            if value is not None:
                assert run.metrics[f"selection/{name}"] == pytest.approx(value)
        for stage, record in manifest["stages"].items():
            for name in ("seconds", "tokens", "tokens_per_second"):
                assert run.metrics[f"{stage}/{name}"] == pytest.approx(record[name])


def test_config_in_the_run(sweep: Sweep) -> None:
    for job, run, pooler in zip(("0", "1"), sweep.runs(), ("mean", "max"), strict=True):
        manifest = json.loads((sweep.directory / job / "manifest.json").read_text())
        assert run.config["pooler"]["name"] == pooler
        assert run.config["pool"]["path"] == ".../pool.jsonl"
        assert {name: run.config[name] for name in manifest["config"]} == manifest["config"]


def test_artifacts_in_the_run(sweep: Sweep) -> None:
    for job, run in zip(("0", "1"), sweep.runs(), strict=True):
        scores, coreset = run.artifacts["scores"], run.artifacts["coreset"]
        files = {artifact.type: {Path(entry.path).name: entry for entry in artifact.manifest.contents}
                 for artifact in (scores, coreset)}  # fmt: skip
        assert set(files["scores"]) == {"scores.parquet", "manifest.json"}
        assert set(files["coreset"]) == {"coreset.jsonl"}
        for entries in files.values():
            for name, entry in entries.items():
                file = sweep.directory / job / name
                assert Path(entry.local_path) == file  # no copy in the home directory
                assert entry.size == file.stat().st_size
        # the coreset says which scores it was made from
        (origin,) = json.loads(coreset.metadata)["made_from"]
        assert origin == {"name": scores.name, "type": "scores", "digest": scores.digest}
        assert json.loads(scores.metadata)["made_from"] == []


def test_no_home_path_and_no_secret_in_the_run(sweep: Sweep) -> None:
    below = sweep.directory.parents[1].rglob("*")
    files = [path for path in below if path.is_file() and sweep.home not in path.parents]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        for secret in SECRETS.values():
            assert secret.encode() not in content, path
        # Hydra's own record of the command line is the user's copy, as is the note of local paths
        if ".hydra" not in path.parts and path.name not in ("multirun.yaml", "local.json"):
            assert str(sweep.home).encode() not in content, path


@pytest.mark.slow
def test_a_key_is_not_written(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    key = "0123456789abcdef" * 2 + "01234567"
    # a service that an earlier test of this process started is not ours to use
    own = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    environment = {**own, "WANDB_API_KEY": key, "HOME": str(tmp_path)}
    outcome = run_process(
        CONSOLE_SCRIPT, *inputs.arguments, "method=random", "logger=wandb", "logger.offline=true",
        "paths.output_dir=out", cwd=tmp_path, environment=environment,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert not [path for path in written if key.encode() in path.read_bytes()]


def test_a_key_is_not_printed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "canary-0123")
    plain = [f"~hydra.{section}.formatters.simple.class" for section in ("hydra_logging", "job_logging")]
    overrides = ["pool=jsonl", "pool.path=/nowhere/canary-0123"]
    jobs = run("-m", *plain, *overrides, "hydra.sweep.dir=sweep")  # Hydra logs the overrides with its own formatter
    config = run("--cfg", "job", *overrides)
    assert (jobs.code, config.code) == (2, 0)
    assert "pool.path=/nowhere/***" in jobs.out
    assert "path: /nowhere/***" in config.out
    assert "canary-0123" not in jobs.out + jobs.err + config.out + config.err


@pytest.mark.parametrize("option", ["none", "disabled"])
def test_a_multirun_without_log_lines(option: str, run: Run, tmp_path: Path) -> None:
    outcome = run("-m", f"hydra/job_logging={option}", "pool=jsonl", "pool.path=/nowhere/x", "hydra.sweep.dir=sweep")
    assert (outcome.code, outcome.last) == (2, "error: pool.path=/nowhere/x does not exist: check the path")


def test_a_setting_of_wandb_that_cannot_be_is_one_line(inputs: Inputs, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    outcome = run_process(
        CONSOLE_SCRIPT, *inputs.arguments, "logger=wandb", "logger.offline=true", "paths.output_dir=out",
        cwd=tmp_path, environment=environment | {"HOME": str(tmp_path), "WANDB_BASE_URL": "no address"},
    )  # fmt: skip
    assert outcome.code == 2
    (line,) = outcome.complaints
    assert line.startswith("error: logger=wandb: ")
    assert "base_url" in line


@pytest.mark.slow
def test_a_failed_selection_closes_its_run(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    outcome = run_process(
        CONSOLE_SCRIPT, *inputs.arguments, "pool.path=nope.jsonl", "logger=wandb", "logger.offline=true",
        "paths.output_dir=out", cwd=tmp_path, environment=environment | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert (outcome.code, outcome.complaints) == (2, ["error: pool.path=nope.jsonl does not exist: check the path"])
    (path,) = (tmp_path / "out").rglob("*.wandb")
    assert WandbRun.read(path).exit_code == 1


def test_csv(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    assert run(*inputs.arguments, "method=random", "paths.output_dir=out").code == 0
    text = (tmp_path / "out" / "metrics.csv").read_text()
    rows = {row["metric"]: row["value"] for row in csv.DictReader(io.StringIO(text))}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert rows["selection/pool"] == "40"
    assert rows["selection/selected"] == str(manifest["counts"]["selected"])
    assert rows["selection/fallback_share"] == ""
    assert float(rows["select/seconds"]) == manifest["stages"]["select"]["seconds"]
    assert list(rows) == sorted(rows)


def test_no_logger(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    assert run(*inputs.arguments, "method=random", "logger=none", "paths.output_dir=out").code == 0
    assert not (tmp_path / "out" / "metrics.csv").exists()
    assert not (tmp_path / "out" / "wandb").exists()
    with tracked(LoggerSettings(name="none"), tmp_path, job_type="select", name="x", config={}) as tracker:
        assert type(tracker) is Tracker


@pytest.mark.parametrize(
    ("asked", "variable", "key", "expected"),
    [
        (False, None, None, "offline"),
        (False, None, "k", "online"),
        (True, None, "k", "offline"),
        (False, "offline", "k", "offline"),
        (False, "disabled", "k", "disabled"),
        (False, "disabled", None, "disabled"),
    ],
)
def test_wandb_mode(
    asked: bool, variable: str | None, key: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in (("WANDB_MODE", variable), ("WANDB_API_KEY", key)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert wandb_mode(asked) == expected


def test_a_key_in_the_netrc_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_wandb_key()
    (tmp_path / "netrc").write_text("not a netrc file\n")
    assert not has_wandb_key()


def test_progress_in_a_log_file_is_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    with progress_bar("score", total=40_000) as bar:
        assert isinstance(bar, ProgressLines)
        clock = bar.start_t
        monkeypatch.setattr(bar, "_time", lambda: clock)
        for seconds in range(1, 41):
            clock = bar.start_t + seconds
            bar.update(1000)
    lines = written.getvalue().splitlines()
    assert "\r" not in written.getvalue()
    assert len(lines) == 40 / LINE_SECONDS
    assert [line.partition(" of ")[0] for line in lines] == [f"score: {percent}%" for percent in (25, 50, 75, 100)]
    assert all("40.0k tokens [" in line and "tokens/s" in line for line in lines)


def test_quick_work_writes_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    with progress_bar("tokenize", total=3, unit="records") as bar:
        bar.update(3)
    assert written.getvalue() == ""


def test_progress_on_a_terminal_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", written)
    with progress_bar("score", total=3) as bar:
        assert not isinstance(bar, ProgressLines)
        bar.update(3)
    text = written.getvalue()
    assert "\n" not in text
    assert text.rstrip("\r").rpartition("\r")[2].strip() == ""
