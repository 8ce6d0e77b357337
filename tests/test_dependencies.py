"""What is installed with the project: bounds in pyproject.toml, pins in constraints files, hashes in lock files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = sorted(ROOT.glob("constraints*.txt"))
LOCKS = sorted((ROOT / "locks").glob("*.lock"))
TOOLS = sorted((ROOT / "locks").glob("*.in"))  # each is locked for an environment of its own
PINNED = [*CONSTRAINTS, *LOCKS, *TOOLS]
MALICIOUS = {("lightning", "2.6.2"), ("lightning", "2.6.3")}

PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[[a-z, -]+\])?==([A-Za-z0-9.!]+)( ; [^\\]+?)?( \\)?")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def pins(path: Path) -> dict[str, str]:
    """The version of every package that a file pins."""
    found = [PIN.fullmatch(line) for line in path.read_text().splitlines()]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def hash_counts(path: Path) -> dict[str, int]:
    """The number of hashes of every package in a lock file."""
    counts: dict[str, int] = {}
    package = ""
    for line in path.read_text().splitlines():
        if match := PIN.fullmatch(line):
            package = canonicalize_name(match[1])
            counts[package] = 0
        elif HASH.fullmatch(line):
            counts[package] += 1
    return counts


def asked_for(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with some of its extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("version", [version for _, version in sorted(MALICIOUS)])
def test_malicious_lightning_is_refused(version: str) -> None:
    (lightning,) = [each for each in asked_for() if each.name == "lightning"]
    assert version not in lightning.specifier
    assert "2.6.1" in lightning.specifier, "only what was malicious is refused"
    assert "2.6.6" in lightning.specifier


@pytest.mark.parametrize("path", PINNED, ids=lambda path: path.name)
def test_no_file_pins_what_was_malicious(path: Path) -> None:
    found = pins(path)
    assert found, "a file without pins says nothing"
    assert not MALICIOUS & found.items()


def test_every_pin_is_locked_with_hashes() -> None:
    locked, counts = {}, {}
    for path in LOCKS:
        if path.with_suffix(".in") not in TOOLS:
            assert not locked.keys() & pins(path).keys(), "no package is in two locks of one environment"
            locked.update(pins(path))
            counts.update(hash_counts(path))
    constraints = pins(ROOT / "constraints.txt")
    assert {name: locked.get(name) for name in constraints} == constraints, "run `make lock`"
    assert [name for name, count in counts.items() if count == 0] == []


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_the_tools_are_locked_with_hashes(path: Path) -> None:
    tools, lock = pins(path), path.with_suffix(".lock")
    assert tools
    assert {name: pins(lock).get(name) for name in tools} == tools, "run `make lock`"
    assert [name for name, count in hash_counts(lock).items() if count == 0] == []


def test_what_is_locked_is_what_the_project_asks_for() -> None:
    locked = pins(ROOT / "locks" / "requirements.lock")
    wrong = [
        str(each)
        for each in asked_for("dev", "embedding", "optuna")
        if not each.specifier.contains(locked.get(canonicalize_name(each.name), "0"))
    ]
    assert wrong == []


def test_the_site_is_built_with_what_the_extra_asks_for() -> None:
    found = pins(ROOT / "locks" / "docs.in")
    extra = [Requirement(line) for line in PROJECT["optional-dependencies"]["docs"]]
    wrong = [str(each) for each in extra if not each.specifier.contains(found.get(canonicalize_name(each.name), "0"))]
    assert wrong == []


def test_the_lower_bounds_are_the_oldest_versions_that_are_tested() -> None:
    """`make test-oldest` runs the suite with constraints-oldest.txt."""
    oldest = pins(ROOT / "constraints-oldest.txt")
    extras = set(PROJECT["optional-dependencies"]) - {"docs", "fuzz"}  # tools that the suite does not need
    wrong = {}
    for each in asked_for(*extras):
        (bound,) = [Version(part.version) for part in each.specifier if part.operator == ">="]
        tested = oldest.get(canonicalize_name(each.name))
        if tested is None or Version(tested) != bound:
            wrong[str(each)] = tested
    assert wrong == {}


@pytest.mark.parametrize("path", PINNED, ids=lambda path: path.name)
def test_no_pin_names_a_place(path: Path) -> None:
    """A host, a URL or a local path would decide where packages come from."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("#"):
            assert not re.search(r"://|(^|[\s'\"(])[/~]\w|index[-_]url|find-links", line), f"{path.name}:{number}"
        elif line:
            assert PIN.fullmatch(line) or HASH.fullmatch(line), f"{path.name}:{number}: {line}"
