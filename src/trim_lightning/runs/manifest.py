"""The record of a run: what was asked, with what, on what, and how it went."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.files.atomic import write_text
from trim_lightning.files.json_files import read_json_object
from trim_lightning.privacy.local import read_local, with_local, write_local
from trim_lightning.privacy.paths import shareable
from trim_lightning.runs.names import MANIFEST
from trim_lightning.store.ledger import Ledger
from trim_lightning.store.versions import PACKAGES, versions

OTHER_PACKAGES = ("hydra-core", "omegaconf", "pyarrow", "safetensors", "datasets", "reasoning-gym", "wandb")


class BrokenRun(Exception):
    """A run that cannot be read back; the message is the reason, and begins with the name of a file of the run."""

    def refusal(self, directory: Path) -> UserError:
        """The same for a user who named this one run, whose files are in a directory."""
        name, _, fault = str(self).partition(" ")
        return UserError(f"{directory / name}: {fault}; run the selection again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that a run has written.

    Raises:
        BrokenRun: if it is missing, cannot be read, or is not a JSON object.
    """
    try:
        return read_json_object(path)
    except FileNotFoundError:
        raise BrokenRun(f"{path.name} is missing: the run did not finish") from None
    except OSError as error:
        raise BrokenRun(f"{path.name} cannot be read ({type(error).__name__})") from error
    except ValueError as error:
        raise BrokenRun(f"{path.name} cannot be read: {error}") from error


@dataclass(frozen=True)
class Manifest:
    """A finished run's manifest, read back.

    Attributes:
        directory: The run's directory.
        content: All of ``manifest.json``, which may be shown to others.
        config: What was asked, with the paths that the manifest leaves out, as far as they are known here.
        inputs: Role to name, sha256 and rows of each input.
        stages: What each stage took, and its key in the store.
        counts: What was counted.
    """

    directory: Path
    content: Mapping[str, Any]
    config: dict[str, Any]
    inputs: Mapping[str, Any]
    stages: Mapping[str, Any]
    counts: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of the run in a directory.

        Raises:
            BrokenRun: if there is none, it cannot be read, or a section is not there.
        """
        content = read_json(directory / MANIFEST)
        for name in ("config", "inputs", "stages", "counts"):
            if not isinstance(content.get(name), Mapping):
                raise BrokenRun(f"{MANIFEST} has no {name}")
        config = with_local(content["config"], read_local(directory))
        return cls(directory, content, config, content["inputs"], content["stages"], content["counts"])

    def sha256(self, role: str) -> str | None:
        """Checksum of an input; None if the manifest does not name it."""
        described = self.inputs.get(role)
        return described.get("sha256") if isinstance(described, Mapping) else None


def git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of this package's checkout, or None if it is not one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_manifest(
    path: Path,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, Any],
    counts: Mapping[str, Any],
    ledger: Ledger,
    **more: Any,
) -> dict[str, Any]:
    """Write ``manifest.json`` and return its content; the paths that it leaves out go to ``local.json``."""
    now = versions((*PACKAGES, *OTHER_PACKAGES))
    ledger.warn_of_versions(now)
    content = shareable(
        {
            "config": config,
            "versions": now,
            "git": git_state(),
            "inputs": inputs,
            "stages": {name: record.as_dict() for name, record in ledger.stages.items()},
            "counts": counts,
            "warnings": ledger.warnings,
            **more,
        }
    )
    write_local(config, path.parent)
    write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path)
    return dict(content)
