"""Versions of libraries: in receipts and manifests, and the coarse part in the keys of the stages that they touch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import trim_lightning
from running import selection
from trim_lightning.cli.store import main
from trim_lightning.store import StageKey, Store
from trim_lightning.store import versions as versions_module
from trim_lightning.store.receipt import RECEIPT
from trim_lightning.store.versions import LIBRARIES

Install = Callable[..., None]
RECORDED = {"python", "torch", "transformers", "tokenizers", "peft", "lightning", "numpy", "trim-lightning"}
RECORDED |= {"bitsandbytes"} if find_spec("bitsandbytes") else set()
SOURCE = Path(trim_lightning.__file__).parent


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(torch="2.9.1")`` makes that the installed version; ``__`` stands for a hyphen."""
    real, others = versions_module.version_of, dict[str, str]()

    def pretend(**packages: str) -> None:
        others.update({name.replace("__", "-"): found for name, found in packages.items()})

    monkeypatch.setattr(versions_module, "version_of", lambda package: others.get(package) or real(package))
    return pretend


def test_a_receipt_says_what_it_was_computed_with(store: Store, install: Install) -> None:
    install(torch="7.1.2+cpu")
    entry = store.get(StageKey("score", 1), lambda _: None)
    receipt = json.loads((entry.path / RECEIPT).read_text())
    assert set(receipt["versions"]) == RECORDED
    assert receipt["versions"]["torch"] == "7.1.2+cpu"
    install(torch="7.1.3", numpy="9.0")
    found = store.get(StageKey("score", 1), lambda _: None)
    assert found.cached
    assert entry.versions == found.versions == receipt["versions"]


@pytest.mark.parametrize(
    ("stage", "touched"),
    [
        ("tokens", {"tokenizers", "transformers"}),
        ("signals", {"torch", "transformers"}),
        ("score", {"torch", "transformers"}),
        ("evaluate", {"torch", "transformers"}),
        ("a stage of somebody else's", {"torch", "transformers"}),
        ("warmup", {"torch", "transformers", "peft"}),
        ("finetune", {"torch", "transformers", "peft"}),
        ("words", set()),
        ("decompressed", set()),
        ("similarity", set()),
    ],
)
def test_a_minor_version_changes_the_keys_that_it_touches(stage: str, touched: set[str], install: Install) -> None:
    install(**dict.fromkeys(("torch", "transformers", "tokenizers", "peft", "numpy"), "1.2.3"))
    before = StageKey(stage, 1).hex
    changed = set()
    for package in ("torch", "transformers", "tokenizers", "peft", "numpy"):
        install(**{package: "1.2.4rc1"})
        assert StageKey(stage, 1).hex == before, "a patch is no other library"
        install(**{package: "1.3"})
        if StageKey(stage, 1).hex != before:
            changed.add(package)
        install(**{package: "1.2.3"})
    assert changed == touched


def test_every_stage_is_listed() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    stages = set(re.findall(r'(?:StageKey|spool)\(\s*"(\w+)"', text)) | set(
        re.findall(r'^    stage = "(\w+)"', text, re.M)
    )
    assert {"tokens", "score", "gradients", "hub"} <= stages
    assert stages | {"warmup", "checkpoints"} == set(LIBRARIES)


def test_an_old_receipt_is_read(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    entry = store.get(StageKey("score", 1), lambda path: (path / "data").write_text("x") and None)
    receipt = json.loads((entry.path / RECEIPT).read_text())
    del receipt["versions"], receipt["seal"], receipt["key"]["versions"]
    (entry.path / RECEIPT).write_text(json.dumps(receipt))
    found = Store(store.root).find(entry.key)
    assert found is not None
    assert found.versions is None
    for command in (["list"], ["verify"], ["show", entry.key.hex], ["prune", "--keep", "0", "--force"]):
        assert main(["--store", str(store.root), *command]) == 0, capsys.readouterr().err
    assert Store(store.root).find(entry.key) is None


@pytest.mark.parametrize("broken", [7, {"torch": 7}, ["torch"]])
def test_versions_that_are_none_are_not_known(store: Store, broken: object) -> None:
    entry = store.get(StageKey("score", 1), lambda _: None)
    receipt = json.loads((entry.path / RECEIPT).read_text())
    del receipt["seal"]
    (entry.path / RECEIPT).write_text(json.dumps({**receipt, "versions": broken}))
    found = Store(store.root).find(entry.key)
    assert found is not None
    assert found.versions is None


def test_a_manifest_has_the_versions_of_each_stage(
    tiny_folder: Callable[[str], Path], pool_file: Path, tmp_path: Path, install: Install
) -> None:
    def run(name: str) -> dict[str, Any]:
        overrides = ["model=hf", f"model.path={tiny_folder('llama')}", "pool=jsonl", f"pool.path={pool_file}"]
        directory, store = tmp_path / name, tmp_path / "store"
        return selection(*overrides, "method=random", output_dir=directory, store_dir=store).manifest

    install(tokenizers="7.1.2", python="3.98.1")
    first = run("first")
    install(tokenizers="7.1.3")
    second = run("second")
    assert first["warnings"] == [line for line in second["warnings"] if "other versions" not in line]
    assert first["stages"]["tokenize"]["versions"] == second["stages"]["tokenize"]["versions"]
    assert second["stages"]["tokenize"]["versions"]["tokenizers"] == "7.1.2"
    assert second["stages"]["select"]["versions"]["tokenizers"] == second["versions"]["tokenizers"] == "7.1.3"
    told = [line for line in second["warnings"] if "other versions" in line]
    assert told == [
        "results in the store were computed with other versions: tokenize with tokenizers 7.1.2 (now 7.1.3)"
    ]
    install(tokenizers="7.2.0")
    assert not run("third")["stages"]["tokenize"]["cached"]
