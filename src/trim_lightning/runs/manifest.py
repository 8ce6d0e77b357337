"""The record of a run: what was asked, with what, on what, and how it went."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trim_lightning.files.atomic import write_text
from trim_lightning.privacy.local import write_local
from trim_lightning.privacy.paths import shareable
from trim_lightning.store.ledger import Ledger

PACKAGES = (
    "trim-lightning", "torch", "lightning", "transformers", "tokenizers", "peft", "hydra-core", "omegaconf",
    "numpy", "pyarrow", "safetensors", "datasets", "reasoning-gym", "wandb",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result can depend on."""
    import platform

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


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
    """Write ``manifest.json`` and return its content; the paths that it leaves out go to ``local.json``.

    Args:
        path: The file.
        config: The resolved config.
        inputs: Role to name, sha256 and rows of each input.
        counts: What was counted.
        ledger: Stages and warnings.
        **more: Further entries.
    """
    content = shareable(
        {
            "config": config,
            "versions": versions(),
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
