"""``select.py`` and ``train.py`` at the root run the command line and do not break the standard library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

IMPORT_SELECT = """
import select
assert select.select and select.__name__ == "select"
print(select.__spec__.origin)
"""

# a barrier of two passes only if both threads run at once, and the loop learns of them through a selector
ASYNCIO = """
import asyncio, threading

async def main():
    barrier = threading.Barrier(2, timeout=120)
    meet = [asyncio.to_thread(barrier.wait) for _ in range(2)]
    child = await asyncio.create_subprocess_exec("echo", "child", stdout=asyncio.subprocess.PIPE)
    (said, _), *places = await asyncio.gather(child.communicate(), *meet)
    print(said.decode().strip(), sorted(places))

asyncio.run(main())
"""

SPAWN = """
import multiprocessing
import subprocess

def answer(number):
    import select
    return number * number if hasattr(select, "select") else None

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(pool.map(answer, [2, 3]))
"""

THREADS = """
import sys, threading

assert "select" not in sys.modules
barrier, found = threading.Barrier(8), []

def get():
    barrier.wait(120)
    import select
    found.append(hasattr(select, "select"))

threads = [threading.Thread(target=get) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(found.count(True))
"""

# a stand-in for the package: these tests are about the entry files, not about what they call
STAND_IN_CLI = """
def select_main():
    import asyncio, selectors, subprocess, sys
    command = [sys.executable, "-c", "print('select', 6 * 7)"]
    print(subprocess.run(command, capture_output=True, text=True).stdout)
    return 3

def train_main():
    import asyncio, selectors, subprocess
    print("train")
    return 4
"""


def run(*arguments: str | Path, cwd: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python with its folder-first path in force, whatever the caller's environment says."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def output(*arguments: str | Path, cwd: Path, path: str | None = None) -> str:
    """Run as `run` does, require success, and return standard output."""
    done = run(*arguments, cwd=cwd, path=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with copies of the entry files and a stand-in for the package."""
    for name in ("select.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "trim_lightning" / "cli"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "hydra_app.py").write_text(STAND_IN_CLI)
    return tmp_path


@pytest.mark.parametrize(("name", "place"), [("select.py", "root"), ("train.py", "elsewhere")])
def test_help_of_the_real_command(name: str, place: str, tmp_path: Path) -> None:
    cwd, script = (ROOT, Path(name)) if place == "root" else (tmp_path, ROOT / name)
    assert "pool" in output(script, "--help", cwd=cwd)


@pytest.mark.parametrize("place", ["root", "elsewhere"])
@pytest.mark.parametrize("arguments", [("-c", "import subprocess, asyncio, socket"), ("-m", "pytest", "--version")])
def test_python_works(arguments: tuple[str, ...], place: str, tmp_path: Path) -> None:
    if place == "root":
        output(*arguments, cwd=ROOT)
    else:
        output(*arguments, cwd=tmp_path, path=str(ROOT))


@pytest.mark.parametrize("flags", [(), ("-P",), ("-I",)])
def test_import_select_in_the_root_gives_the_library(flags: tuple[str, ...]) -> None:
    origin = output(*flags, "-c", IMPORT_SELECT, cwd=ROOT)
    assert origin == "built-in" or not origin.endswith(".py")


def test_every_spelling_of_the_folder_is_passed_over(checkout: Path) -> None:
    (checkout / "link").symlink_to(checkout)
    (checkout / "again").mkdir()
    shutil.copy(checkout / "select.py", checkout / "again")
    (checkout / "empty" / "select").mkdir(parents=True)  # importable as a namespace package
    entries = [
        "",
        ".",
        "link",
        str(checkout / "empty"),
        str(checkout / "again"),
        str(checkout / "again" / ".."),
    ]
    set_path = f"import sys; sys.path[:0] = {entries!r}\n"
    origin = output("-c", set_path + IMPORT_SELECT, cwd=checkout)
    assert origin == "built-in" or not origin.endswith(".py")


def test_no_library_module_is_said_plainly(checkout: Path) -> None:
    script = """
import sys
from importlib.machinery import BuiltinImporter
find = BuiltinImporter.find_spec
BuiltinImporter.find_spec = lambda name, *rest: None if name == "select" else find(name, *rest)
sys.path[:] = [entry for entry in sys.path if "lib-dynload" not in entry]
import select
"""
    done = run("-c", script, cwd=checkout)
    assert done.returncode == 1
    assert "ImportError: this Python has no standard-library module named select" in done.stderr


def test_asyncio_runs_concurrently_in_the_root() -> None:
    assert output("-c", ASYNCIO, cwd=ROOT) == "child [0, 1]"


def test_threads_may_import_select_at_once() -> None:
    assert output("-c", THREADS, cwd=ROOT) == "8"


def test_spawned_workers_in_the_root() -> None:
    script = """
import multiprocessing
with multiprocessing.get_context("spawn").Pool(2) as pool:
    print(pool.map(abs, [-2, -3]))
"""
    assert output("-c", script, cwd=ROOT) == "[2, 3]"


def test_spawned_workers_of_a_script_beside_the_entry_file(checkout: Path) -> None:
    (checkout / "script.py").write_text(SPAWN)
    assert output("script.py", cwd=checkout) == "[4, 9]"


def test_a_spawned_worker_runs_nothing_of_the_entry_file(checkout: Path) -> None:
    script = """
import runpy, sys
left = runpy.run_path("select.py", run_name="__mp_main__")
assert not {"select", "trim_lightning"} & set(sys.modules), "the worker loaded something"
import select
print(select is not left, hasattr(select, "select"))
"""
    assert output("-c", script, cwd=checkout) == "True True"


@pytest.mark.parametrize(("name", "said", "code"), [("select.py", "select 42", 3), ("train.py", "train", 4)])
@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_entry_file_calls_its_command(name: str, said: str, code: int, place: str, checkout: Path) -> None:
    cwd, script = (checkout, Path(name)) if place == "root" else (checkout.parent, checkout / name)
    done = run(script, cwd=cwd, path="")
    assert (done.returncode, done.stdout.strip()) == (code, said), done.stderr


@pytest.mark.parametrize("name", ["select.py", "train.py"])
def test_importing_an_entry_file_runs_no_command(name: str, checkout: Path) -> None:
    script = f"import sys, {Path(name).stem}; print('trim_lightning' in sys.modules)"
    assert output("-c", script, cwd=checkout) == "False"
