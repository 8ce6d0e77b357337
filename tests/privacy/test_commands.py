"""Keys, home, user name and paths are planted; then every command runs, and every byte that it left is searched."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli.conftest import Outcome, run_process
from cli.test_logging import transactions
from tiny_models import build_tiny_model, write_records

pytestmark = pytest.mark.faults

USER = "canaryuser7"
VARIABLES = {
    "WANDB_API_KEY": "c0ffee" * 6 + "cafe",
    "HF_TOKEN": "hf_canaryAAAABBBBCCCC",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+0123456789",
    "MY_SECRET": "canary-own-0123456789",
}
TYPED = {"password in an address": "canary-pw-1", "token in an address": "canary-tk-2", "key in a value": "canary-ak-3"}
KEYS = {**VARIABLES, **TYPED}
# what is for this machine alone, and may name its folders
LOCAL_FILES = ("local.json", "multirun.yaml")
LOCAL_ENDINGS = (".log", ".wandb")
LOCAL_FOLDERS = (".hydra", ".cache", ".config")
FAULT = """
import os, sys
import trim_lightning.pipeline.select
def fail(*_, **__): raise RuntimeError(f"refused {os.environ['MY_SECRET']} at https://me:canary-pw-1@host/x?token=canary-tk-2")
trim_lightning.pipeline.select.run_selection = fail
from trim_lightning.cli.hydra_app import select_main
sys.exit(select_main())
"""


@dataclass
class Scene:
    """A user's directories, and what each command printed.

    Attributes:
        root: Everything that was written lies below.
        home: The user's home, with the store in it; runs go elsewhere.
        outcomes: By name of the command.
    """

    root: Path
    home: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def files(self) -> list[Path]:
        """All files that the commands left, the inputs left out; the links of W&B lead to some of them."""
        inputs = self.home / "inputs"
        return [path for path in sorted(self.root.rglob("*")) if path.is_file() and inputs not in path.parents]

    def shared(self) -> list[Path]:
        """The files that are meant to be shown to others."""
        store = self.home / "store"
        return [
            path
            for path in self.files()
            if path.name not in LOCAL_FILES
            and path.suffix not in LOCAL_ENDINGS
            and not set(LOCAL_FOLDERS) & set(path.parts)
            and store not in path.parents
        ]


def contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and the texts that are packed or split in them."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        yield repr((table.to_pydict(), table.schema.metadata)).encode()
    if path.suffix == ".wandb":
        yield "\n".join(str(record) for record in transactions(path)).encode()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Run everything once, in processes of their own."""
    root = tmp_path_factory.mktemp("scene")
    home = root / "people" / USER
    given, out = home / "inputs", root / "disk" / "runs"
    given.mkdir(parents=True)
    out.mkdir(parents=True)
    build_tiny_model("llama", given / "model")
    write_records(given / "pool.jsonl", 40, seed=1, groups=("a", "b"))
    write_records(given / "targets.jsonl", 4, seed=2, edge_cases=False)
    write_records(given / "held.jsonl", 6, seed=3, edge_cases=False)
    found = Scene(root, home)
    own = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    environment = {**own, **VARIABLES, "HOME": str(home), "USER": USER, "LOGNAME": USER, "OMP_NUM_THREADS": "1"}
    select = [
        "model=hf", f"model.path={given / 'model'}", "model.dtype=float32", "trainer=cpu", "pool=jsonl",
        f"pool.path={given / 'pool.jsonl'}", "target=jsonl", "target.path=~/inputs/targets.jsonl", "warmup=none",
        "saliency.num_layers=2", "selection.count=8", f"paths.store_dir={home / 'store'}", "logger=wandb",
        "logger.offline=true",
        'logger.tags=["${oc.env:MY_SECRET}","https://me:canary-pw-1@host/x?token=canary-tk-2","api_key=canary-ak-3"]',
    ]  # fmt: skip

    def run(name: str, program: str, *arguments: str) -> None:
        found.outcomes[name] = run_process(
            Path(sys.executable).with_name(program), *arguments, cwd=root / "disk", environment=environment
        )

    run("select", "trim-select", *select, f"hydra.run.dir={out / 'one'}", "scoring.save_token_scores=true")
    run("sweep", "trim-select", "-m", *select, "pooler=mean,max", f"hydra.sweep.dir={out / 'sweep'}")
    run("train", "trim-train", *select, "train.epochs=1", f"evaluation.path={given / 'held.jsonl'}",
        f"hydra.run.dir={home / 'trained'}")  # fmt: skip
    run("train on a file", "trim-train", *select, "train.epochs=1", f"coreset.path={out / 'one' / 'coreset.jsonl'}",
        f"hydra.run.dir={out / 'given'}")  # fmt: skip
    run("compare", "trim-compare", str(out / "sweep"))
    run("compare two", "trim-compare", str(out / "one"), str(out / "given"), str(home / "trained"),
        "--output", str(out / "two"))  # fmt: skip
    run("explain", "trim-explain", str(out / "one"), "--row", "0", "--html", str(out / "explain.html"))
    for layout in ("jsonl", "parquet"):
        run(f"export {layout}", "trim-export", str(home / "trained"), "--format", layout,
            "--output", str(out / layout))  # fmt: skip
    run("mistake", "trim-select", *select, 'pool.path="https://me:canary-pw-1@host/x?token=canary-tk-2"',
        f"hydra.run.dir={out / 'mistake'}")  # fmt: skip
    run("mistyped", "trim-select", *select, "logger.api_key=canary-ak-3", f"hydra.run.dir={out / 'mistyped'}")
    run("mistake in a sweep", "trim-select", "-m", *select, "seed=1,2", 'pool.path="nope?token=canary-tk-2"',
        f"hydra.sweep.dir={out / 'broken'}")  # fmt: skip
    run("fault", "python", "-c", FAULT, *select, f"hydra.run.dir={out / 'fault'}")
    run("fault in a sweep", "python", "-c", FAULT, "-m", *select, "seed=1,2", f"hydra.sweep.dir={out / 'faulty'}")
    return found


def test_every_command_ended_as_it_should(scene: Scene) -> None:
    wrong = {"mistake": 2, "mistyped": 2, "mistake in a sweep": 2, "fault": 1, "fault in a sweep": 1}
    for name, outcome in scene.outcomes.items():
        assert outcome.code == wrong.get(name, 0), (name, outcome.err)
    assert "Traceback" in scene.outcomes["fault"].err
    assert "refused *** at https://***@host/x?token=***" in scene.outcomes["fault"].err
    assert scene.outcomes["mistake"].last.startswith("error: pool.path=https://***@host/x?token=*** does not exist")
    assert "nope?token=*** does not exist" in scene.outcomes["mistake in a sweep"].last
    assert "Traceback" not in scene.outcomes["mistake"].err


def test_no_key_is_in_any_byte(scene: Scene) -> None:
    files = scene.files()
    assert len(files) > 100
    for path in files:
        for content in contents(path):
            for name, key in KEYS.items():
                assert key.encode() not in content, (name, path.relative_to(scene.root))


def test_no_key_is_printed(scene: Scene) -> None:
    for name, outcome in scene.outcomes.items():
        for key in KEYS.values():
            assert key not in outcome.out + outcome.err, name


def test_what_is_shared_names_neither_home_nor_user_nor_a_path(scene: Scene) -> None:
    files = scene.shared()
    names = {path.name for path in files}
    assert names >= {
        "report.html", "compare.html", "compare.csv", "compare.parquet", "explain.html", "manifest.json",
        "metrics.json", "coreset.jsonl", "scores.parquet", "scores.jsonl", "token_scores.parquet",
        "target_tokens.parquet", "fingerprints.safetensors", "export.json", "adapter_config.json", "predictions.jsonl",
        "messages.parquet",
    }  # fmt: skip
    for path in files:
        for content in contents(path):
            for word in (str(scene.root), USER, "people/"):
                assert word.encode() not in content, (word, path.relative_to(scene.root))


def test_what_goes_to_the_tracker_names_neither_home_nor_user_nor_host(scene: Scene) -> None:
    logs = [path for path in scene.files() if path.suffix == ".wandb" and not path.parent.is_symlink()]
    assert len(logs) >= 6
    for path in logs:
        for record in transactions(path):
            text = sent(record)
            for word in (str(scene.root), USER, "people/"):
                assert word not in text, (word, path.relative_to(scene.root))
            if record.WhichOneof("record_type") == "run":
                assert record.run.host == "hidden" != socket.gethostname()
    assert not list(scene.root.rglob("wandb-metadata.json"))


def sent(record: Any) -> str:
    """A record as text without the places of files on this disk, which only the upload itself reads."""
    kind = record.WhichOneof("record_type")
    if kind == "artifact":
        for entry in record.artifact.manifest.contents:
            entry.local_path = ""
    return str(record)


def test_what_stays_here_keeps_its_paths(scene: Scene) -> None:
    pool = str(scene.home / "inputs" / "pool.jsonl").encode()
    one = scene.root / "disk" / "runs" / "one"
    assert pool in (one / "local.json").read_bytes()
    assert pool in (one / ".hydra" / "overrides.yaml").read_bytes()
    assert b"oc.env:MY_SECRET" in (one / ".hydra" / "overrides.yaml").read_bytes()


def test_the_store_names_no_path(scene: Scene) -> None:
    files = [path for path in (scene.home / "store").rglob("*") if path.is_file()]
    assert {"entry.json", "shards.json"} < {path.name for path in files}
    for path in files:
        for content in contents(path):
            assert str(scene.root).encode() not in content, path.relative_to(scene.root)
            assert USER.encode() not in content, path.relative_to(scene.root)


def test_a_moved_run_says_what_it_misses(scene: Scene, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(scene.root / "disk" / "runs" / "one", moved)
    (moved / "local.json").unlink()
    outcome = run_process(Path(sys.executable).with_name("trim-explain"), str(moved), "--row", "0", cwd=tmp_path)
    assert outcome.code == 2
    assert "name it with --store DIR" in outcome.last


def test_the_search_finds_what_is_packed(tmp_path: Path) -> None:
    words = [f"word {number} " * 20 for number in range(500)]
    pq.write_table(pa.table({"text": [*words, VARIABLES["MY_SECRET"]]}), tmp_path / "x.parquet", compression="zstd")
    assert any(VARIABLES["MY_SECRET"].encode() in content for content in contents(tmp_path / "x.parquet"))
