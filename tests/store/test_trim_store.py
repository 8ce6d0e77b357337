"""``trim-store``: lists, shows, checks and deletes, and never takes what a process is building."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from trim_lightning.cli import store as cli_store
from trim_lightning.cli.store import bytes_of, main, seconds_of
from trim_lightning.store import StageKey, Store, receipt
from trim_lightning.store import store as store_module
from trim_lightning.store.inventory import chosen, items
from trim_lightning.store.receipt import RECEIPT

Run = Callable[..., tuple[int, str, str]]
DAY = 86_400


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with three results of 1, 2 and 3 kB, last used 40, 20 and 0 days ago, and work in progress."""
    store = Store(tmp_path / "store")
    for place, stage in enumerate(("tokens", "score", "score"), start=1):
        entry = store.get(StageKey(stage, 1, {"n": place}), writer(place))
        used = time.time() - (60 - 20 * place) * DAY
        os.utime(entry.path / RECEIPT, (used, used))
    workspace = store.workspace_of(StageKey("score", 1, {"n": 9}))
    workspace.mkdir(parents=True)
    (workspace / "shard").write_bytes(b"y" * 500)
    return store.root


def writer(size: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / "data").write_bytes(b"x" * size * 1000)

    return write


@pytest.fixture
def run(root: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["--store", str(root), *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def results(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("*/*/data"))


def test_list(run: Run, root: Path) -> None:
    code, out, _ = run("list")
    assert code == 0
    lines = [line.split() for line in out.splitlines()[2:6]]
    assert [line[0] for line in lines] == ["score", "score", "tokens", "partial"], "largest first"
    assert [line[2] for line in lines][-1] == "500"
    assert " ".join(lines[2]).endswith("0 s 40 d")
    assert "4 entries" in out
    assert "2 entries" in run("list", "--stage", "score")[1]


def test_show(run: Run, root: Path) -> None:
    (item,) = [item for item in items(root) if item.stage == "tokens"]
    code, out, _ = run("show", item.name[:10])
    assert code == 0
    shown = json.loads(out)
    versions = shown["key"].pop("versions")
    assert shown["key"] == {"stage": "tokens", "version": 1, "settings": {"n": 1}, "inputs": {}}
    assert all(shown["versions"][package].startswith(found) for package, found in versions.items())
    assert run("show", "zz")[2] == "error: zz: no entry with a key that begins so; trim-store list shows them\n"
    assert "3 entries" in run("show", "")[2]


def test_verify_finds_one_flipped_bit(run: Run, root: Path) -> None:
    assert run("verify")[:2] == (0, "3 of 3 entries are whole\n")
    victim = next(item for item in items(root) if item.stage == "score")
    data = bytearray((victim.path / "data").read_bytes())
    data[7] ^= 1
    (victim.path / "data").write_bytes(data)
    code, out, err = run("verify")
    assert code == 2
    assert out == f"score/{victim.name[:12]}: data has another checksum\n2 of 3 entries are whole\n"
    assert err.startswith("error: 1 damaged entries")
    assert run("verify", victim.name[:20])[0] == 2
    assert run("verify", "--delete")[0] == 0
    assert not victim.path.exists()
    assert run("verify")[:2] == (0, "2 of 2 entries are whole\n")


def entry_of_large_files(root: Path, monkeypatch: pytest.MonkeyPatch, files: int) -> Path:
    """An entry of files of 100 blocks of 16 bytes, of which samples of 8 blocks are read."""
    monkeypatch.setattr(receipt, "BLOCK", 16)
    monkeypatch.setattr(receipt, "BLOCKS", 8)
    for module in (receipt, store_module, cli_store):
        monkeypatch.setattr(module, "SAMPLED", 3 * 8 * 16)

    def write(path: Path) -> None:
        for number in range(files):
            (path / f"part{number}").write_bytes(bytes(number + place % 200 for place in range(1600)))

    return Store(root).get(StageKey("score", 1, {"large": files}), write).path


def damage_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_verify_reads_samples_of_a_large_entry_and_all_on_request(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = entry_of_large_files(root, monkeypatch, 3)
    code, out, _ = run("verify", path.name)
    assert code == 0
    assert out == (
        "1 of 1 entries are whole\n1 of them by their sizes and samples; trim-store verify --whole reads every byte\n"
    )
    damage_byte(path / "part1", 100)  # between two blocks
    assert run("verify", path.name)[0] == 0
    code, out, _ = run("verify", "--whole", path.name)
    assert code == 2
    assert "part1 has another checksum" in out
    assert "samples" not in out
    damage_byte(path / "part1", 1599)  # the last block
    assert "part1 has another checksum" in run("verify", path.name)[1]
    (path / "part2").write_bytes(b"short")
    assert "part2 has another size" in run("verify", path.name)[1]


def test_samples_are_of_other_files_each_time(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = entry_of_large_files(root, monkeypatch, 30)
    damage_byte(path / "part7", 0)
    codes = {run("verify", path.name)[0] for _ in range(100)}
    assert codes == {0, 2}, "three of thirty files are read"


def test_a_run_reads_all_of_an_entry_up_to_a_size(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, key = entry_of_large_files(root, monkeypatch, 3), StageKey("score", 1, {"large": 3})
    damage_byte(path / "part1", 100)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "WHOLE", 4799)
        assert Store(root).find(key) is not None
    assert Store(root).find(key) is None


def test_a_receipt_without_samples_is_checked_by_what_it_has(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = entry_of_large_files(root, monkeypatch, 3)
    kept = json.loads((path / RECEIPT).read_text())
    for file in kept["files"].values():
        del file["sample"]
    (path / RECEIPT).write_text(json.dumps({**kept, "seal": receipt.seal_of(kept)}))
    assert run("verify", path.name)[0] == 0
    for part in range(3):
        damage_byte(path / f"part{part}", 100)
    assert run("verify", path.name)[0] == 2


def test_prune_by_last_use(run: Run, root: Path) -> None:
    code, out, _ = run("prune", "--unused", "30d", "--dry-run")
    assert code == 0
    assert "1 entries would be deleted" in out
    assert len(results(root)) == 3
    run("prune", "--unused", "30d")
    assert [item.stage for item in items(root)] == ["score", "score", "partial"]


def test_prune_to_a_size_takes_the_longest_unused(run: Run, root: Path) -> None:
    whole = sum(item.size for item in items(root))
    code, _, _ = run("prune", "--keep", f"{(whole - 1000) / 1000}k")
    assert code == 0
    assert [item.stage for item in items(root) if item.finished] == ["score", "score"], "unused for longest"


def test_a_use_makes_an_entry_young(root: Path) -> None:
    store = Store(root)
    assert chosen(items(root), unused_seconds=30 * DAY)
    assert store.find(StageKey("tokens", 1, {"n": 1}))
    assert not chosen(items(root), unused_seconds=30 * DAY)


def test_what_is_being_built_stays(run: Run, root: Path) -> None:
    (work,) = [item for item in items(root) if not item.finished]
    with FileLock(str(root / "locks" / f"{work.name}.lock")):
        code, out, _ = run("prune", "--stage", "partial", "--force")
    assert code == 0
    assert "1 left: a running process is building them" in out
    assert work.path.exists()
    run("prune", "--stage", "partial", "--force")
    assert not work.path.exists()


def test_what_was_used_today_stays_unless_forced(run: Run, root: Path) -> None:
    code, out, _ = run("prune", "--all")
    assert code == 0
    assert "2 left: used within the last day" in out
    assert len(items(root)) == 2


def test_only_what_a_store_makes_is_touched(run: Run, root: Path, tmp_path: Path) -> None:
    mine = root / "notes" / "important"
    mine.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ("a" * 64)).mkdir(parents=True)
    (root / "linked").symlink_to(elsewhere)
    assert run("prune", "--all", "--force")[0] == 0
    assert mine.is_dir()
    assert (elsewhere / ("a" * 64)).is_dir()


def test_a_folder_that_is_no_store_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "home" / "documents").mkdir(parents=True)
    assert main(["--store", str(tmp_path / "home"), "prune", "--all", "--force"]) == 2
    assert "is no stage store" in capsys.readouterr().err


def test_an_empty_store_and_an_unknown_stage(capsys: pytest.CaptureFixture[str], run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["--store", str(tmp_path / "empty"), "list"]) == 0
    assert capsys.readouterr().out == "\n0 entries, 0 B\n"
    assert run("list", "--stage", "none")[:2] == (0, "\n0 entries, 0 B\n")


def test_the_store_may_be_named_behind_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in (["list"], ["verify"], ["prune", "--all"]):
        assert main([*command, "--store", str(tmp_path / "empty"), "--lock", "none"]) == 0
        assert main([*command, "--store", str(tmp_path / "nope")]) == 2
    assert main(["show", "ab", "--store", str(tmp_path / "empty")]) == 2
    assert "no entry with a key" in capsys.readouterr().err


def test_a_damaged_entry_that_is_being_built_again_is_told(run: Run, root: Path) -> None:
    victim = next(item for item in items(root) if item.stage == "score")
    (victim.path / "data").write_bytes(b"")
    with FileLock(str(root / "locks" / f"score-{victim.name}.lock")):
        assert run("verify", "--delete")[0] == 2
    assert run("verify", f"score/{victim.name[:9]}", "--delete")[0] == 0
    assert "no entry" in run("show", f"tokens/{victim.name[:9]}")[2]


def test_prune_all(run: Run, root: Path) -> None:
    assert run("prune", "--all", "--force")[0] == 0
    assert items(root) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("prune",), "say what may go"),
        (("prune", "--unused", "soon"), "--unused=soon"),
        (("prune", "--keep", "much"), "--keep=much"),
        (("tidy",), "invalid choice: 'tidy'"),
        ((), "list|show|verify|prune"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: tuple[str, ...], told: str, run: Run) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


def test_no_store(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--store", str(tmp_path / "none"), "list"]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_sizes_and_ages_as_given() -> None:
    assert [bytes_of(text) for text in ("10", "2k", "1.5M", "3GB")] == [10, 2000, 1_500_000, 3_000_000_000]
    assert [seconds_of(text) for text in ("90s", "12h", "2w")] == [90, 43_200, 14 * DAY]
