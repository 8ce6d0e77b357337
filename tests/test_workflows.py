"""The workflow files call make, on the Pythons that the project names, with no more rights than they need."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# job to the rights beyond reading that it needs
RIGHTS = {
    "publish of docs": {"pages", "id-token"},
    "build of release": {"id-token", "attestations"},
    "publish of release": {"id-token"},
    "announce of release": {"contents"},
}


def workflow(path: Path) -> dict[Any, Any]:
    return dict(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_workflows_only_call_make(path: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = [step["run"] for job in workflow(path)["jobs"].values() for step in job["steps"] if "run" in step]
    for line in lines:
        made = re.fullmatch(r'make ([a-z-]+)( TAG="\$GITHUB_REF_NAME")?', line)
        assert made, f"{line}: a step calls make, and takes what comes from outside through the environment"
        assert made[1] in targets
    # an expression within a command would run what a branch or a title says
    assert not [line for line in lines if "${{" in line]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_jobs_have_no_more_rights_than_they_need(path: Path) -> None:
    found = workflow(path)
    assert found["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in found[True], (
        "would give a stranger's change these rights"
    )  # yaml reads on as True
    for name, job in found["jobs"].items():
        writes = {right for right, kind in job.get("permissions", {}).items() if kind == "write"}
        assert writes == RIGHTS.get(f"{name} of {path.stem}", set())
        assert not [step for step in job["steps"] if "secrets." in str(step)], "a stored key"
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_the_tests_run_on_every_python_that_the_project_names() -> None:
    jobs = workflow(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in PROJECT["classifiers"]]
    pythons = [match[1] for match in named if match]
    assert jobs["test"]["strategy"]["matrix"]["python"] == pythons
    assert PROJECT["requires-python"] == f">={pythons[0]}"


@pytest.fixture
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_notes", ROOT / ".ci" / "notes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHANGES = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n\n### Added\n\n- One.\n\n## [0.1.0]\n\n- Zero.\n"


def test_the_notes_of_a_release_are_its_section(release: ModuleType) -> None:
    assert release.notes("v0.2.0", "0.2.0", CHANGES) == "### Added\n\n- One.\n"
    assert release.notes("v0.1.0", "0.1.0", CHANGES) == "- Zero.\n"


@pytest.mark.parametrize(
    ("tag", "version", "said"),
    [("v0.2.1", "0.2.0", "tag v0.2.0"), ("v0.3.0", "0.3.0", "no section"), ("v0x2y0", "0x2y0", "no section")],
)
def test_a_release_that_does_not_fit_is_refused(release: ModuleType, tag: str, version: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        release.notes(tag, version, CHANGES)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("target", ["notes", "release"])
@pytest.mark.parametrize(
    "tag", ["", "v9.9.9", "v1;touch PWNED", "v1$(shell touch PWNED)", "v1'`touch PWNED`", 'v1"$$(touch PWNED)"']
)
def test_a_tag_is_refused_and_never_run(target: str, tag: str, tmp_path: Path) -> None:
    pwned = tmp_path / "pwned"
    given = tag.replace("PWNED", str(pwned))
    done = subprocess.run(
        ["make", "-C", str(ROOT), target, f"TAG={given}", f"PYTHON={sys.executable}"],
        capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "PATH": f"{tmp_path}:{os.defpath}"},
    )  # fmt: skip
    assert done.returncode == 2
    assert f"error: the tag {given} is not v{PROJECT['version']}" in done.stderr
    assert "gh release" not in done.stdout
    assert not pwned.exists()


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert f"version = {{{PROJECT['version']}}}" in (ROOT / "README.md").read_text()
