"""The results of the GPU kit: one JSON file, into which parts are merged, and the section of the documentation."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tabulate import tabulate

from trim_lightning.files.atomic import write_atomically

PACKAGES = ("torch", "transformers", "lightning", "peft", "tokenizers", "trl")
MARKS = {True: "yes", False: "**no**", None: ""}


def machine() -> dict[str, Any]:
    """The card, its driver, and the versions that figures depend on."""
    card: dict[str, Any] = {"card": platform.processor() or platform.machine(), "memory_gib": None, "driver": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        card = {
            "card": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1), "driver": driver(),
            "cuda": torch.version.cuda,
        }  # fmt: skip
    versions = {package: found for package in PACKAGES if (found := installed(package)) is not None}
    return {**card, "python": platform.python_version(), **versions}


def driver() -> str | None:
    """The driver's version, if nvidia-smi tells it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def installed(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read(file: Path) -> dict[str, Any]:
    """The results so far: card to ``machine`` and ``parts``."""
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return results


def merge(file: Path, on: Mapping[str, Any], name: str, result: Mapping[str, Any]) -> None:
    """Put one part's result in the place of its earlier one on the same card; whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        results = read(file)
        entry = results.setdefault(on["card"], {"machine": {}, "parts": {}})
        entry["machine"] = dict(on)
        entry["parts"][name] = dict(result)
        write_atomically(file, json.dumps(results, indent=1) + "\n")


def section(results: Mapping[str, Any], order: Sequence[str]) -> str:
    """The markdown of docs/benchmarks.md: for each card a line on what it is and a table over its parts."""
    texts = []
    for card, entry in results.items():
        on = entry["machine"]
        versions = ", ".join(f"{name} {on[name]}" for name in ("python", *PACKAGES) if name in on)
        about = f"{on['memory_gib']} GiB, driver {on['driver']}, {versions}" if on.get("driver") else versions
        parts = entry["parts"]
        lines = [
            [f"`{name}`" if place == 0 else "", what, value, aim, MARKS[parts[name]["ok"]] if place == 0 else ""]
            for name in (*(name for name in order if name in parts), *(name for name in parts if name not in order))
            for place, (what, value, aim) in enumerate(parts[name]["rows"])
        ]
        table = tabulate(
            lines, headers=["part", "what", "value", "aim", "held"], tablefmt="github", disable_numparse=True
        )
        missing = ", ".join(f"`{name}`" for name in order if name not in parts)
        left_out = f"\n\nNot run: {missing}." if missing else ""
        texts.append(f"{card}: {about}.\n\n{table}{left_out}\n")
    return "\n".join(texts)
