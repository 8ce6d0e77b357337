"""One process and two give the same scores, however the two are started; a kill loses neither files nor processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from safetensors.numpy import load_file

from composing import compose_select
from running import run_select
from tiny_models import write_records
from trim_lightning.engine.devices import Resources, is_spread, model_for, one_device
from trim_lightning.engine.trainer import with_strategy
from trim_lightning.errors import UserError
from trim_lightning.methods.base import load_selector
from trim_lightning.models.load import ModelRecipe
from trim_lightning.pipeline.opening import open_task
from trim_lightning.store import StageKey, Store
from trim_lightning.store import store as store_module
from trim_lightning.store.processes import LeaderFailed, PartDone, Processes

CHECKOUT = Path(__file__).parents[2]
# one thread each, and no launcher of the machine that runs the tests
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
    "OMP_NUM_THREADS": "1"
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
Select = Callable[..., list[str]]


@pytest.fixture(scope="session")
def big_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of several shards."""
    path = tmp_path_factory.mktemp("big") / "pool.jsonl"
    write_records(path, 1500, seed=5)
    return path


@pytest.fixture
def select(tiny_folder: Callable[[str], Path], big_pool: Path, target_file: Path, tmp_path: Path) -> Select:
    """The command line of a selection, with a store and an output directory of their own by name."""

    def command(name: str, *overrides: str) -> list[str]:
        return [
            str(CHECKOUT / "select.py"), "model=hf", f"model.path={tiny_folder('llama')}", "model.dtype=float32",
            "pool=jsonl", f"pool.path={big_pool}", "target=jsonl", f"target.path={target_file}", "warmup=none",
            "saliency.num_layers=3", "logger=none", f"paths.output_dir={tmp_path / name}",
            f"paths.store_dir={tmp_path / name}-store", f"hydra.run.dir={tmp_path / name}-hydra", *overrides,
        ]  # fmt: skip

    return command


@pytest.fixture(scope="session")
def alone(
    tiny_folder: Callable[[str], Path], big_pool: Path, target_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output of the same selection in one process."""
    root = tmp_path_factory.mktemp("alone")
    return run_select(
        "model=hf", f"model.path={tiny_folder('llama')}", "model.dtype=float32", "pool=jsonl", f"pool.path={big_pool}",
        "target=jsonl", f"target.path={target_file}", "warmup=none", "saliency.num_layers=3", "logger=none",
        "trainer=cpu", output_dir=root / "output", store_dir=root / "store",
    )  # fmt: skip


def run(command: list[str], cwd: Path, code: int = 0) -> str:
    process = subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        told, _ = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the processes that it started as well
        raise
    assert process.returncode == code, told[-3000:]
    return told


def scores(directory: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(directory / "scores.parquet")
    return {name: table[name].to_numpy(zero_copy_only=False) for name in ("score", "mean", "max", "coverage", "rank")}


def assert_same_scores(one: Path, two: Path) -> None:
    first, second = scores(one), scores(two)
    for name in ("score", "mean", "max", "coverage"):
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=1e-5)
    assert (first["rank"] == second["rank"]).mean() > 0.99


@pytest.mark.parametrize(
    ("launcher", "trainer"),
    [
        pytest.param([sys.executable], ["trainer=ddp_cpu"], id="spawned", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, ["trainer=ddp_cpu"], id="torchrun", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, FSDP, id="fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_score_as_one(
    launcher: list[str], trainer: list[str], alone: Path, select: Select, tmp_path: Path
) -> None:
    told = run([*launcher, *select("two", *trainer)], tmp_path)
    assert_same_scores(alone, tmp_path / "two")
    one, two = (load_file(path / "fingerprints.safetensors")["vectors"] for path in (alone, tmp_path / "two"))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
    (facts,) = (tmp_path / "two-store").glob("score/*/shards.json")
    assert json.loads(facts.read_text())["shards"] > 3, "the pool is too small to be spread"
    assert told.count("INFO    score:") == 1, "only one process tells"
    assert "Couldn't infer" not in told
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (alone, tmp_path / "two")]
    assert manifests[0]["counts"] == manifests[1]["counts"]
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.parts and path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "trainer"),
    [
        pytest.param([sys.executable], ["trainer=ddp_cpu"], id="spawned"),
        pytest.param(TORCHRUN, FSDP, id="fsdp"),
    ],
)
def test_two_processes_cascade_as_one(launcher: list[str], trainer: list[str], select: Select, tmp_path: Path) -> None:
    """The first layers alone, some rows alone, and what is kept is agreed upon."""
    cascade = ["scoring=cascade", "scoring.cascade.layers=2", "scoring.cascade.keep=0.3", "report.enabled=false"]
    run([sys.executable, *select("one", "trainer=cpu", *cascade)], tmp_path)
    told = run([*launcher, *select("two", *trainer, *cascade)], tmp_path)
    tables = [pq.read_table(tmp_path / name / "scores.parquet") for name in ("one", "two")]
    for name in ("score", "cheap_score"):
        one, two = (table[name].to_numpy(zero_copy_only=False) for table in tables)
        both = ~np.isnan(one) & ~np.isnan(two)
        np.testing.assert_allclose(one[both], two[both], rtol=0, atol=1e-5)
        assert (np.isnan(one) == np.isnan(two)).mean() > 0.99
    assert told.count("cascade: 500 of") == 1, "only one process tells what the sample says"


@pytest.mark.slow
def test_more_processes_than_shards(select: Select, pool_file: Path, tmp_path: Path) -> None:
    overrides = (f"pool.path={pool_file}", "trainer=ddp_cpu")
    run([sys.executable, *select("two", *overrides)], tmp_path)
    assert np.isfinite(scores(tmp_path / "two")["score"]).sum() > 30


# the cut is given, since what is chosen for two processes is another, and with it dropout
SHORT = ("pool.limit=150", "warmup=lora", "warmup.fraction=0.2", "method.num_checkpoints=2",
         "warmup.tokens_per_micro_batch=512")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "trainer"),
    [
        pytest.param(["method=rds"], ["trainer=ddp_cpu"], id="rds"),
        pytest.param(["method=less", *SHORT], ["trainer=ddp_cpu"], id="less"),
        pytest.param(["method=cld", *SHORT], FSDP, id="cld-fsdp"),
    ],
)
def test_two_processes_share_the_passes_of_other_methods(
    method: list[str], trainer: list[str], select: Select, tmp_path: Path
) -> None:
    run([sys.executable, *select("one", "trainer=cpu", *method)], tmp_path)
    run([*TORCHRUN, *select("two", *trainer, *method)], tmp_path)
    np.testing.assert_allclose(scores(tmp_path / "one")["score"], scores(tmp_path / "two")["score"], atol=1e-5)


@pytest.mark.parametrize("method", ["less", "tagcos"])
def test_record_gradients_of_divided_weights_are_refused_before_anything_is_trained(
    method: str, pool_file: Path, target_file: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = compose_select(
        ["model=hf", f"model.path={tiny_folder('llama')}", "pool=jsonl", f"pool.path={pool_file}", "target=jsonl",
         f"target.path={target_file}", f"method={method}", *FSDP, f"paths.output_dir={tmp_path / 'out'}",
         f"paths.store_dir={tmp_path / 'store'}"]
    )  # fmt: skip
    selector, store = load_selector(settings.method), Store(tmp_path / "store")
    cpu = replace(settings, trainer={"accelerator": "cpu"})  # opening would ask for a launcher first
    task = replace(open_task(cpu, selector, store), settings=settings)
    with pytest.raises(UserError, match="trainer=fsdp: gradients of single records need whole weights"):
        selector.score(task)
    assert not list((tmp_path / "store").glob("checkpoints/*"))


class Held:
    """Weights that count how often they are given back."""

    released = 0

    def model(self) -> str:
        return "loaded"

    def recipe(self) -> ModelRecipe:
        return ModelRecipe(SimpleNamespace(device_map=None), torch.float32)  # type: ignore[arg-type]

    def release(self) -> None:
        self.released += 1


def test_a_spread_pass_leaves_no_model_in_the_process_that_starts_it() -> None:
    held = Held()
    assert model_for(Resources({"devices": 1}), held) == "loaded"  # type: ignore[arg-type]
    assert held.released == 0
    assert isinstance(model_for(Resources({"devices": 2}), held), ModelRecipe)  # type: ignore[arg-type]
    assert held.released == 1


@pytest.mark.slow
def test_data_workers_change_no_byte(alone: Path, select: Select, tmp_path: Path) -> None:
    run([sys.executable, *select("two", "trainer=cpu", "scoring.num_workers=2")], tmp_path)
    assert (alone / "scores.parquet").read_bytes() == (tmp_path / "two/scores.parquet").read_bytes()


@pytest.mark.slow
def test_a_mistake_in_a_spawned_process_is_one_line(
    tiny_folder: Callable[[str], Path], select: Select, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged-model"
    shutil.copytree(tiny_folder("llama"), damaged)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-64])
    told = run(
        [sys.executable, *select("two", "trainer=ddp_cpu", f"model.path={damaged}", "method=perplexity")],
        tmp_path,
        code=2,
    )
    assert told.splitlines()[-1].startswith("error: model.path=damaged-model: cannot be loaded")


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def shards_of(store: Path) -> list[Path]:
    return list(store.glob("partial/score-*/similarity-*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_process_and_goes_on(
    trainer: str, number: signal.Signals, select: Select, tmp_path: Path
) -> None:
    run([sys.executable, *select("whole", f"trainer={trainer}")], tmp_path)
    command, store = [sys.executable, *select("cut", f"trainer={trainer}")], tmp_path / "cut-store"
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(shards_of(store)) > 0)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, told = process.communicate(timeout=300)
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        assert told.splitlines()[-1] == "interrupted: finished work is kept; the same command goes on from there"
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not alive, "processes outlive the run"
    before = {path.name: path.stat().st_mtime_ns for path in shards_of(store)}
    run(command, tmp_path)
    (result,) = store.glob("score/*")
    assert {name: (result / name).stat().st_mtime_ns for name in before} == before, "finished shards are kept"
    assert (tmp_path / "cut/scores.parquet").read_bytes() == (tmp_path / "whole/scores.parquet").read_bytes()


@pytest.mark.slow
def test_six_kills_at_random_moments(select: Select, tmp_path: Path) -> None:
    run([sys.executable, *select("whole", "trainer=cpu")], tmp_path)
    command = [sys.executable, *select("killed", "trainer=cpu")]
    generator = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        moment = generator.uniform(0.5, 8)
        while process.poll() is None and time.monotonic() - started < moment:
            time.sleep(0.01)
        process.kill()
        process.wait()
    run(command, tmp_path)
    assert (tmp_path / "killed/scores.parquet").read_bytes() == (tmp_path / "whole/scores.parquet").read_bytes()


# ------------------------------------------------------------------------- who leads, and what is refused


def test_strategies() -> None:
    assert not is_spread({"accelerator": "cpu", "devices": 1})
    assert is_spread({"devices": 2})
    assert is_spread({"devices": "0,1"})
    assert is_spread({"devices": 1, "num_nodes": 2})
    spawned = with_strategy({"devices": 2, "strategy": "ddp"})
    assert spawned["strategy"] == "ddp_spawn"
    assert isinstance(spawned["plugins"][0], LightningEnvironment), "Slurm would give every process rank 0"
    assert one_device({"devices": [2, 3]})["devices"] == [2]
    assert one_device({"devices": "2,3"})["devices"] == [2]
    assert one_device({"devices": 4})["devices"] == 1
    assert not is_spread({"devices": "0,"})
    assert with_strategy({"devices": 2, "strategy": "ddp_fork"})["strategy"] == "ddp_fork"
    assert with_strategy({"devices": 1, "strategy": "ddp"})["strategy"] == "auto"


def test_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    assert with_strategy({"devices": 2, "strategy": "ddp"})["strategy"] == "ddp"
    with pytest.raises(UserError, match=r"3 processes, but the launcher started 2"):
        with_strategy({"devices": 3})
    with pytest.raises(UserError, match=r"1 process, but the launcher started 2"):
        with_strategy({"devices": 1})


@pytest.mark.parametrize("arguments", [{"devices": 2, "num_nodes": 2}, {"devices": 2, "strategy": "fsdp"}])
def test_what_needs_a_launcher(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="torchrun or srun"):
        with_strategy(arguments)


class Scripted(Processes):
    """Processes whose other side is a list: what the leader said, or is to say."""

    size = 2

    def __init__(self, rank: int, said: list[Any]) -> None:
        self.rank, self.said = rank, said

    def agree(self, topic: str, value: Callable[[], Any]) -> Any:
        if self.leads:
            self.said.append((topic, value()))
            return self.said[-1][1]
        message = self.said.pop(0)
        if message is LeaderFailed or message[0] != topic:
            raise LeaderFailed
        return message[1]

    def give_up(self) -> None:
        self.said.append(LeaderFailed)


KEY = StageKey("stage", 1, {})


@pytest.mark.parametrize("together", [False, True])
def test_helpers_follow_the_leader(tmp_path: Path, together: bool) -> None:
    said: list[Any] = []
    built: list[str] = []

    def build(who: str) -> Callable[[Path], None]:
        def work(directory: Path) -> None:
            built.append(who)
            (directory / who).write_text(who)

        return work

    leader, helper = Store(tmp_path, processes=Scripted(0, said)), Store(tmp_path, processes=Scripted(1, said))
    entry = leader.get(KEY, build("leader"), resumable=True, together=together)
    if together:
        # in life both build at once; here the helper comes late, into a directory that is no longer there
        said.pop(0)
    assert helper.get(KEY, build("helper"), resumable=True, together=together).path == entry.path
    assert built == ["leader"]
    assert said == []
    leader.get(KEY, build("leader"), together=together)
    helper.get(KEY, build("helper"), together=together)
    assert built == ["leader"], "found by both"
    leader.dismiss_helpers()
    leader.get(KEY, build("leader"))
    assert said == [], "the leader goes on alone"
    with pytest.raises(PartDone):
        helper.dismiss_helpers()


def test_helpers_learn_that_the_leader_failed(tmp_path: Path) -> None:
    said: list[Any] = []

    def fail(directory: Path) -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        Store(tmp_path, processes=Scripted(0, said)).get(KEY, fail)
    with pytest.raises(LeaderFailed):
        Store(tmp_path, processes=Scripted(1, said)).get(KEY, fail)


def test_a_leader_that_fails_amid_a_pass_ends_its_process(tmp_path: Path) -> None:
    said: list[Any] = []

    def fail(directory: Path) -> None:
        raise UserError("out of memory")

    with pytest.raises(SystemExit):
        Store(tmp_path, processes=Scripted(0, said)).get(KEY, fail, resumable=True, together=True)
    assert LeaderFailed not in said, "helpers inside a pass would not hear it"


def test_a_helper_that_is_out_of_step_builds_nothing(tmp_path: Path) -> None:
    said: list[Any] = [("another stage", "partial/elsewhere")]

    def build(directory: Path) -> None:
        raise AssertionError("built into another stage's directory")

    with pytest.raises(LeaderFailed):
        Store(tmp_path, processes=Scripted(1, said)).get(KEY, build, together=True)


def test_helpers_need_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SIGHT_SECONDS", 0)
    said: list[Any] = []
    Store(tmp_path / "here", processes=Scripted(0, said)).get(KEY, lambda directory: None)
    with pytest.raises(UserError, match="shared directory"):
        Store(tmp_path / "elsewhere", processes=Scripted(1, said)).get(KEY, lambda directory: None)
