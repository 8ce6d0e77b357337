"""Kills, signals, full and read-only disks, damaged entries, moved clocks: nothing is lost, nothing is wrong."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disturbed import Ended, Undisturbed

pytestmark = pytest.mark.faults

STAGES = ("warm-up", "target pass", "scoring", "selection", "training", "evaluation", "report")
MOMENTS = (1, 2, 3)
PATIENCE = 10.0  # seconds from a signal to the end of the run
HOW_TO_GO_ON = "the same command goes on from there"
Count = Callable[[str, str], None]


def moment(undisturbed: Undisturbed, stage: str, which: int) -> int:
    """The call of a stage's function: the first, the second, and the last of the run."""
    calls = undisturbed.calls(stage)
    assert calls, stage
    if stage == "training":  # the same function as the warm-up, later
        return calls - 3 + which
    return {1: 1, 2: min(2, calls), 3: calls}[which]


@pytest.mark.parametrize("which", MOMENTS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("action", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_signal_in_a_stage(undisturbed: Undisturbed, count_fault: Count, action: str, stage: str, which: int) -> None:
    folder = undisturbed.folder(f"{action}-{stage}-{which}")
    ended = undisturbed.run(folder, fault={"point": stage, "nth": moment(undisturbed, stage, which), "action": action})
    assert ended.after is not None, "the fault never came"
    count_fault(action, stage)
    if action == "SIGKILL":
        assert ended.code == -9
    else:
        assert ended.code == 130, ended.error
        assert ended.after < PATIENCE
        assert HOW_TO_GO_ON in ended.error.splitlines()[-1]
        assert "Traceback" not in ended.error
    undisturbed.check_that_it_goes_on(folder, undisturbed.check_what_is_left(folder))
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def points(undisturbed: Undisturbed) -> dict[str, int]:
    """How many renames and flushes to disk a run makes."""
    return {point: undisturbed.calls(point) for point in ("rename", "fsync")}


def test_a_kill_before_every_rename(undisturbed: Undisturbed, points: dict[str, int], count_fault: Count) -> None:
    for nth in range(1, points["rename"] + 1):
        folder = undisturbed.folder("rename")
        ended = undisturbed.run(folder, fault={"point": "rename", "nth": nth, "action": "SIGKILL"})
        assert ended.code == -9, (nth, ended.error)
        count_fault("SIGKILL", "before a rename")
        undisturbed.check_that_it_goes_on(folder, undisturbed.check_what_is_left(folder))


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EACCES", "EIO"])
def test_a_disk_that_refuses(undisturbed: Undisturbed, points: dict[str, int], count_fault: Count, name: str) -> None:
    step = 1 if name == "ENOSPC" else 5
    for nth in range(1, points["fsync"] + 1, step):
        folder = undisturbed.folder("disk")
        ended = undisturbed.run(folder, fault={"point": "fsync", "nth": nth, "action": name})
        count_fault(name, "at a flush to disk")
        if ended.code:  # a report or a note that cannot be written ends nothing
            check_the_line(ended, os.strerror(getattr(errno, name)))
        undisturbed.check_that_it_goes_on(folder, undisturbed.check_what_is_left(folder))


def check_the_line(ended: Ended, reason: str) -> None:
    """One clear line, exit code 2, no traceback."""
    assert ended.code == 2, ended.error
    assert len(ended.lines) == 1, ended.error
    assert reason in ended.lines[0]
    assert "Traceback" not in ended.error


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """``mounted(name, options)``: a small file system of its own."""
    made: list[Path] = []

    def mount(name: str, options: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True)
        if done.returncode:
            pytest.skip("no right to mount a file system here")
        made.append(path)
        return path

    yield mount
    for path in made:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("kilobytes", [4, 16, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("what", ["paths.store_dir", "hydra.run.dir"])
def test_a_full_disk(
    undisturbed: Undisturbed, count_fault: Count, mounted: Callable[..., Path], what: str, kilobytes: int
) -> None:
    small = mounted("small", f"size={kilobytes}k")
    folder = undisturbed.folder("full")
    ended = undisturbed.run(folder, f"{what}={small / 'inside'}")
    count_fault("full disk", what)
    if ended.code:
        check_the_line(ended, os.strerror(errno.ENOSPC))
    undisturbed.check_that_it_goes_on(folder, undisturbed.check_what_is_left(folder))


@pytest.mark.parametrize("what", ["paths.store_dir", "hydra.run.dir"])
def test_a_read_only_disk(
    undisturbed: Undisturbed, count_fault: Count, mounted: Callable[..., Path], what: str
) -> None:
    place = mounted("fixed", "size=64k,ro")
    folder = undisturbed.folder("fixed")
    ended = undisturbed.run(folder, f"{what}={place / 'inside'}")
    count_fault("read-only disk", what)
    check_the_line(ended, "")
    assert re.search("read-only|cannot be written|Read-only", ended.lines[0]), ended.lines
    undisturbed.check_that_it_goes_on(folder, undisturbed.check_what_is_left(folder))


def damaged_files(undisturbed: Undisturbed) -> list[Path]:
    """Files of finished stages, two of each stage."""
    store = undisturbed.baseline / "store"
    found: list[Path] = []
    for stage in sorted(path for path in store.iterdir() if path.name not in ("locks", "partial", "digests")):
        files = sorted(file for file in stage.rglob("*") if file.is_file() and file.stat().st_size)
        found += [files[0], files[-1]]
    return [file.relative_to(store) for file in dict.fromkeys(found)]


@pytest.mark.parametrize("how", ["truncated", "a bit flipped", "deleted"])
def test_damaged_entries(undisturbed: Undisturbed, count_fault: Count, how: str) -> None:
    for name in damaged_files(undisturbed):
        folder = undisturbed.finished_copy("damaged")
        file = folder / "store" / name
        content = bytearray(file.read_bytes())
        if how == "deleted":
            file.unlink()
        elif how == "truncated":
            file.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        count_fault(how, f"store: {name.parts[0]}")
        undisturbed.check_that_it_goes_on(folder, {})


@pytest.mark.parametrize("shift", [-10 * 365 * 86_400, -3600, 10 * 365 * 86_400])
@pytest.mark.parametrize("begun", [False, True])
def test_a_clock_that_is_moved(undisturbed: Undisturbed, count_fault: Count, shift: int, begun: bool) -> None:
    folder = undisturbed.folder("clock")
    if begun:
        ended = undisturbed.run(folder, fault={"point": "scoring", "nth": 2, "action": "SIGKILL"})
        assert ended.code == -9
    receipts = undisturbed.check_what_is_left(folder)
    ended = undisturbed.run(folder, clock=shift)
    count_fault("clock moved", "between two runs" if begun else "a whole run")
    assert ended.code == 0, ended.error
    undisturbed.check_that_it_goes_on(folder, {**receipts, **undisturbed.check_what_is_left(folder)})


# in scoring the last batch, since the first holds one record that is longer than a batch
@pytest.mark.parametrize(("stage", "which"), [("target pass", 1), ("scoring", 3), ("evaluation", 1)])
def test_memory_that_runs_out_in_a_pass(undisturbed: Undisturbed, count_fault: Count, stage: str, which: int) -> None:
    folder = undisturbed.folder("memory")
    ended = undisturbed.run(
        folder, fault={"point": stage, "nth": moment(undisturbed, stage, which), "action": "memory"}
    )
    count_fault("memory", stage)
    assert ended.code == 0, ended.error
    assert "is run in halves" in ended.out + ended.error
    for name, wanted in undisturbed.results.items():
        assert (folder / "out" / name).read_bytes() == wanted, name


@pytest.mark.parametrize(("stage", "nth"), [("warm-up", 1), ("warm-up", 2), ("training", 3)])
def test_memory_that_runs_out_in_a_training(undisturbed: Undisturbed, count_fault: Count, stage: str, nth: int) -> None:
    folder = undisturbed.folder("memory")
    ended = undisturbed.run(folder, fault={"point": stage, "nth": nth, "action": "memory"})
    count_fault("memory", stage)
    check_the_line(ended, "tokens_per_micro_batch")
    undisturbed.check_that_it_goes_on(folder, undisturbed.check_what_is_left(folder))


@pytest.mark.parametrize("which", MOMENTS)
def test_a_data_worker_that_dies(undisturbed: Undisturbed, count_fault: Count, which: int) -> None:
    """The batches are then made in the process itself; shards that are written stay."""
    folder = undisturbed.folder("worker")
    fault = {"point": "scoring", "nth": moment(undisturbed, "scoring", which), "action": "worker"}
    ended = undisturbed.run(folder, "scoring.num_workers=2", fault=fault)
    count_fault("data worker killed", "scoring")
    assert ended.code == 0, ended.error
    assert "this one makes them from here on" in ended.out
    for name, wanted in undisturbed.results.items():
        assert (folder / "out" / name).read_bytes() == wanted, name
    undisturbed.check_what_is_left(folder)


def test_a_report_that_cannot_be_drawn(undisturbed: Undisturbed, count_fault: Count) -> None:
    folder = undisturbed.folder("report")
    ended = undisturbed.run(folder, fault={"point": "report", "nth": 1, "action": "memory"})
    count_fault("memory", "report")
    assert ended.code == 0, ended.error
    undisturbed.check_that_it_goes_on(folder, undisturbed.check_what_is_left(folder))
