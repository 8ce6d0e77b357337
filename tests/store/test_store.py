"""The stage store: built once, damage found, kills and races survived, orphans swept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from trim_lightning.files.atomic import write_atomically
from trim_lightning.store import StageKey, Store
from trim_lightning.store import store as store_module
from trim_lightning.store.receipt import RECEIPT
from trim_lightning.store.store import ORPHAN_AGE

KEY = StageKey("stage", 1, {"a": 1}, {"pool": "ff"})

# `build` counts itself in a log, then takes a while; the start is shared, so that all processes race
RACER = """
import sys, time
from pathlib import Path
from trim_lightning.store import StageKey, Store

root, lock, resumable, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", sys.argv[4]

def build(directory):
    with (root / "log").open("a") as log:
        log.write(name + "\\n")
    for part in ("one", "two"):
        time.sleep(0.1)
        (directory / f".{part}.{name}").write_text(part * 1000)
        (directory / f".{part}.{name}").replace(directory / part)
    return {"tokens": 7}

store = Store(root / "store", lock=lock)
(root / f"ready-{name}").touch()
while not (root / "go").exists():
    time.sleep(0.005)
entry = store.get(StageKey("stage", 1, {"a": 1}, {"pool": "ff"}), build, resumable=resumable)
print(entry.cached, entry.facts["tokens"], (entry.path / "one").read_text() == "one" * 1000)
"""

SLEEPER = """
import sys, time
from pathlib import Path
from trim_lightning.store import StageKey, Store

def build(directory):
    (directory / "half").write_text("half")
    print("started", flush=True)
    time.sleep(600)

Store(sys.argv[1], lock=sys.argv[2]).get(
    StageKey("stage", 1, {"a": 1}, {"pool": "ff"}), build, resumable=sys.argv[3] == "True"
)
"""


class Builder:
    """Writes three files and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, directory: Path) -> dict[str, Any]:
        self.calls += 1
        (directory / "empty").touch()
        (directory / "data.bin").write_bytes(bytes(range(256)))
        (directory / "sub").mkdir(exist_ok=True)
        (directory / "sub" / RECEIPT).write_text("a file of the builder's own with an unlucky name")
        return {"tokens": 12, "padding": 0.25, "by_size": {10: 1, 9: 2}}


def partial_of(store: Store) -> list[str]:
    directory = store.root / "partial"
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


# ------------------------------------------------------------------------------------------------ once


def test_a_result_is_built_once_and_found_afterwards(store: Store) -> None:
    build = Builder()
    assert store.find(KEY) is None
    first = store.get(KEY, build)
    assert (first.cached, first.facts["tokens"], first.facts["seconds"] >= 0) == (False, 12, True)
    assert first.path == store.root / "stage" / KEY.hex
    for reader in (store, Store(store.root)):
        again = reader.get(KEY, build)
        assert (again.cached, again.path) == (True, first.path)
        assert again.facts["seconds"] == first.facts["seconds"]
    assert build.calls == 1
    assert partial_of(store) == []
    receipt = json.loads((first.path / RECEIPT).read_text())
    assert receipt["key"] == KEY.description
    assert sorted(receipt["files"]) == ["data.bin", "empty", "sub/entry.json"]
    assert receipt["files"]["data.bin"]["sha256"] == hashlib.sha256(bytes(range(256))).hexdigest()


def test_keys_do_not_share_results(store: Store) -> None:
    build = Builder()
    paths = {store.get(StageKey("stage", 1, {"a": value}), build).path for value in (1, True, 1.0, "1", 2)}
    assert (len(paths), build.calls) == (4, 4)


def test_a_builder_may_time_itself(store: Store) -> None:
    assert store.get(KEY, lambda directory: {"seconds": 0.125}).facts["seconds"] == 0.125
    assert store.get(StageKey("nothing", 1), lambda directory: None).facts.keys() == {"seconds"}


def test_spool_gives_the_directory_of_a_derived_input(store: Store) -> None:
    calls = []

    def build(directory: Path) -> None:
        calls.append(directory)
        (directory / "records.jsonl").write_text("{}\n")

    paths = [store.spool("unpacked", {"sha256": "ab", "limit": limit}, build) for limit in (1, 1.0, None)]
    assert paths[0] == paths[1] != paths[2]
    assert len(calls) == 2
    assert (paths[0] / "records.jsonl").read_text() == "{}\n"


# ---------------------------------------------------------------------------------------------- damage


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path / "data.bin", 100),
    "longer": lambda path: (path / "data.bin").write_bytes(bytes(257)),
    "flipped bit": lambda path: flip(path / "data.bin", 77),
    "flipped bit in a folder": lambda path: flip(path / "sub" / RECEIPT, 3),
    "empty file filled": lambda path: (path / "empty").write_text("x"),
    "missing file": lambda path: (path / "data.bin").unlink(),
    "missing empty file": lambda path: (path / "empty").unlink(),
    "missing receipt": lambda path: (path / RECEIPT).unlink(),
    "empty receipt": lambda path: os.truncate(path / RECEIPT, 0),
    "truncated receipt": lambda path: os.truncate(path / RECEIPT, 300),
    "receipt of zeros": lambda path: (path / RECEIPT).write_bytes(bytes(500)),
    "receipt of another kind": lambda path: (path / RECEIPT).write_text("[]"),
    "receipt without facts": lambda path: (path / RECEIPT).write_text('{"files": {}}'),
    "file in place of a folder": lambda path: (shutil.rmtree(path / "sub"), (path / "sub").touch())[1],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_mended(name: str, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    build = Builder()
    path = store.get(KEY, build).path
    DAMAGES[name](path)
    fresh = Store(store.root)  # a process checks checksums once
    entry = fresh.get(KEY, build)
    assert (entry.cached, build.calls) == (False, 2)
    assert (path / "data.bin").read_bytes() == bytes(range(256))
    assert "is damaged" in caplog.text
    assert Store(store.root).get(KEY, build).cached
    assert partial_of(store) == []


def test_every_flipped_bit_of_a_receipt_is_found_or_harmless(store: Store) -> None:
    build = Builder()
    entry = store.get(KEY, build)
    receipt = entry.path / RECEIPT
    intact = receipt.read_bytes()
    refused = 0
    for place in range(len(intact)):
        data = bytearray(intact)
        data[place] ^= 1 << place % 8
        receipt.write_bytes(bytes(data))
        reader = Store(store.root)
        reader._verified.add(KEY.hex)  # the data is whole: only the receipt is in question
        try:
            facts = reader.verify(entry.path)["facts"]
        except store_module.StoreError:
            refused += 1
        else:
            assert facts == json.loads(intact)["facts"]
    assert refused > 0.8 * len(intact)


def test_a_missing_or_cut_file_is_found_even_within_one_process(store: Store) -> None:
    build = Builder()
    for damage in ("truncated", "missing file", "missing receipt"):
        DAMAGES[damage](store.get(KEY, build).path)
        assert not store.get(KEY, build).cached


# ---------------------------------------------------------------------------------- failures and kills


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failed_builder_leaves_nothing(error: BaseException, store: Store) -> None:
    def fail(directory: Path) -> Mapping[str, Any]:
        (directory / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.get(KEY, fail)
    assert store.find(KEY) is None
    assert partial_of(store) == []
    assert store.get(KEY, Builder()).facts["tokens"] == 12


def test_resumable_work_is_kept_and_handed_on(store: Store) -> None:
    seen: list[list[str]] = []

    def build(directory: Path) -> Mapping[str, Any]:
        seen.append(sorted(path.name for path in directory.iterdir()))
        (directory / f"part{len(seen)}").write_text(str(len(seen)))
        if len(seen) < 3:
            raise KeyboardInterrupt
        return {}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            store.get(KEY, build, resumable=True)
        assert store.find(KEY) is None
    entry = store.get(KEY, build, resumable=True)
    assert seen == [[], ["part1"], ["part1", "part2"]]
    assert sorted(path.name for path in entry.path.iterdir()) == [RECEIPT, "part1", "part2", "part3"]
    assert not store.workspace_of(KEY).exists()


@pytest.mark.parametrize("lock", ["file", "soft", "none"])
@pytest.mark.parametrize("resumable", [False, True])
def test_a_killed_builder_leaves_nothing_under_a_final_name(lock: str, resumable: bool, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SLEEPER, str(tmp_path), lock, str(resumable)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "started"
        process.send_signal(signal.SIGKILL)
    store = Store(tmp_path, lock=lock)
    assert not store.path_of(KEY).exists()
    assert store.find(KEY) is None
    left: list[bool] = []

    def build(directory: Path) -> None:
        left.append((directory / "half").exists())
        (directory / "half").write_text("whole")

    entry = store.get(KEY, build, resumable=resumable)
    assert left == [resumable]
    assert (entry.path / "half").read_text() == "whole"


# ----------------------------------------------------------------------------------------------- races


@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize("lock", ["file", "soft", "none"])
def test_four_racing_processes_publish_one_result(lock: str, resumable: bool, tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), lock, str(resumable), str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    while len(list(tmp_path.glob("ready-*"))) < 4:
        assert all(racer.poll() is None for racer in racers), racers[0].communicate()[1]
        time.sleep(0.01)
    (tmp_path / "go").touch()
    said = [racer.communicate(timeout=600) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4, said
    answers = [out.split() for out, _ in said]
    assert all(answer[1:] == ["7", "True"] for answer in answers)
    builders = (tmp_path / "log").read_text().split()
    if lock != "none":
        assert len(builders) == 1
        assert sorted(answer[0] for answer in answers) == ["False", "True", "True", "True"]
    store = Store(tmp_path / "store")
    assert [path.name for path in (store.root / "stage").iterdir()] == [KEY.hex]
    assert partial_of(store) == []
    entry = store.find(KEY)
    assert entry is not None
    assert (entry.path / "two").read_text() == "two" * 1000


@pytest.mark.parametrize("resumable", [False, True])
def test_a_builder_that_was_overtaken_takes_the_others_result(resumable: bool, tmp_path: Path) -> None:
    slow, fast = Store(tmp_path, lock="none"), Store(tmp_path, lock="none")

    def overtaken(directory: Path) -> Mapping[str, Any]:
        (directory / "data").write_text("same")
        other = fast.get(KEY, lambda place: (place / "data").write_text("same") and {"by": "fast"}, resumable=resumable)
        assert not other.cached
        (directory / "late").write_text("")  # a shared workspace is gone by now, and this fails
        return {"by": "slow"}

    entry = slow.get(KEY, overtaken, resumable=resumable)
    assert (entry.cached, entry.facts["by"]) == (True, "fast")
    assert partial_of(slow) == []


# --------------------------------------------------------------------------------------------- orphans


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    for item in [*path.rglob("*"), path]:
        os.utime(item, (then, then))


def test_orphans_are_swept_and_live_or_resumable_work_is_not(store: Store) -> None:
    partial = store.root / "partial"
    unique = "0" * 32
    orphans = [f"stage-{KEY.hex}-{unique}", f"two-words-{KEY.hex}-{unique}", f"damaged-{unique}"]
    kept = [f"stage-{KEY.hex}", f"two-words-{KEY.hex}", "somebody-elses-folder"]
    for name in [*orphans, *kept]:
        (partial / name).mkdir(parents=True)
        (partial / name / "data").write_text("data")
        age(partial / name, ORPHAN_AGE + 60)
    young = partial / f"stage-{KEY.hex}-{'1' * 32}"
    young.mkdir()
    busy = partial / f"stage-{KEY.hex}-{'2' * 32}"  # old, but a file in it is being written to
    (busy / "sub").mkdir(parents=True)
    age(busy, ORPHAN_AGE + 60)
    (busy / "sub" / "data").write_text("data")
    age(busy / "sub" / "data", 1)
    os.utime(busy / "sub", (0, 0))
    store.get(StageKey("other", 1), Builder())
    assert partial_of(store) == sorted([*kept, young.name, busy.name])


# --------------------------------------------------------------------------------------------- digests


def test_file_digest_reads_a_file_once_and_again_after_any_change(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    real = store_module.sha256_of
    monkeypatch.setattr(store_module, "sha256_of", lambda path: reads.append(path) or real(path))
    path = tmp_path / "file"

    def digest() -> str:
        return Store(store.root).file_digest(path)

    path.write_text("one")
    assert digest() == digest() == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 1
    status = path.stat()
    time.sleep(0.02)  # more than a tick of the file system's clock
    path.write_text("two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` or rsync would leave it
    assert digest() == hashlib.sha256(b"two").hexdigest()
    path.write_text("three")
    assert digest() == hashlib.sha256(b"three").hexdigest()
    assert len(reads) == 3


def test_file_digest_goes_by_the_content_behind_a_link_and_survives_a_broken_note(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert store.file_digest(tmp_path / "link") == store.file_digest(tmp_path / "file")
    (note,) = (store.root / "digests").iterdir()
    for broken in (b"", b"[]", b"\xff\xfe", b'{"mark": null}', b'{"mark": [], "sha256": "00"}'):
        note.write_bytes(broken)
        assert store.file_digest(tmp_path / "file") == hashlib.sha256(b"one").hexdigest()


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
