"""Figures of load: a million records, two hundred jobs, five thousand picks on a page."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import materials
from materials import WORK

POOLERS = ("mean_max_coverage", "mean", "max", "quantile", "topk_mean")
PENALTIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
COUNTS = (10, 20, 40, 80, 160)
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def selection(directory: Path, pool: Path, target: Path, *overrides: str, multirun: bool = False) -> dict[str, Any]:
    """Run ``trim-select`` on the tiny model; its wall time in seconds and peak resident memory in GiB."""
    folder = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    command = [
        str(Path(sys.executable).with_name("trim-select")), *(["-m"] if multirun else []), "model=hf",
        f"model.path={materials.tiny().directory}", "model.dtype=float32", "pool=jsonl", f"pool.path={pool}",
        "target=jsonl", f"target.path={target}", "warmup=none", "saliency.num_layers=2", "trainer=cpu", "logger=none",
        "scoring.tokens_per_batch=8192", f"paths.store_dir={directory / 'store'}", f"{folder}={directory / 'output'}",
        *overrides,
    ]  # fmt: skip
    shutil.rmtree(directory / "store", ignore_errors=True)
    shutil.rmtree(directory / "output", ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"seconds": round(time.perf_counter() - started, 1), "peak_gib": round(peak, 2)}


def files(name: str, lines: Sequence[str]) -> tuple[Path, Path, Path]:
    """A folder of its own, a pool of these lines, and ten targets among them."""
    directory = WORK / name
    directory.mkdir(parents=True, exist_ok=True)
    pool, target = directory / "pool.jsonl", directory / "target.jsonl"
    pool.write_text("".join(lines), encoding="utf-8")
    target.write_text("".join(lines[:10]), encoding="utf-8")
    return directory, pool, target


def million() -> dict[str, Any]:
    """A million short records with the tiny model, end to end by the command: peak resident memory."""
    number = int(os.environ.get("TRIM_BENCH_RECORDS", "1000000"))
    generator = np.random.default_rng(0)
    words = [word for line in materials.pool_lines()[:2000] for word in json.loads(line)["prompt"].split()]
    lines = []
    for row in range(number):
        picked = [words[place] for place in generator.integers(len(words), size=14)]
        record = {"id": f"r{row}", "prompt": " ".join(picked[:10]), "response": " ".join(picked[10:])}
        lines.append(json.dumps(record) + "\n")
    directory, pool, target = files("million", lines)
    del lines
    took = selection(directory, pool, target)
    manifest = json.loads((directory / "output" / "manifest.json").read_text())
    return {
        "ratio": took["peak_gib"], "wanted": "< 2 GiB", "records": number, "seconds": took["seconds"],
        "selected": manifest["counts"]["selected"],
        "page_mb": round((directory / "output" / "report.html").stat().st_size / 1e6, 1),
        "stages": {name: stage["seconds"] for name, stage in manifest["stages"].items()},
    }  # fmt: skip


def stored() -> dict[str, Any]:
    """Bytes a token of the stored pass over 200,000 generated records, 57 target groups; peak memory of the command."""
    return of_generated(int(os.environ.get("TRIM_BENCH_RECORDS", "200000")), groups=57)


def six_million() -> dict[str, Any]:
    """The same of 6,000,000 records without groups, the whole command."""
    return of_generated(int(os.environ.get("TRIM_BENCH_RECORDS", "6000000")), groups=1)


def of_generated(number: int, groups: int) -> dict[str, Any]:
    """A selection from short generated records with the tiny model, one target a group, end to end by the command."""
    directory = WORK / f"stored-{groups}"
    directory.mkdir(parents=True, exist_ok=True)
    pool, target = directory / "pool.jsonl", directory / "target.jsonl"
    generator = np.random.default_rng(0)
    words = [word for line in materials.pool_lines()[:2000] for word in json.loads(line)["prompt"].split()]
    with pool.open("w", encoding="utf-8") as file:
        for row in range(number):
            picked = [words[place] for place in generator.integers(len(words), size=14)]
            record = {"id": f"r{row}", "prompt": " ".join(picked[:10]), "response": " ".join(picked[10:])}
            file.write(json.dumps(record) + "\n")
    with pool.open(encoding="utf-8") as file, target.open("w", encoding="utf-8") as targets:
        for place, line in zip(range(max(groups, 10)), file, strict=False):
            targets.write(json.dumps({**json.loads(line), "subtask": f"g{place % groups:02d}"}) + "\n")
    took = selection(directory, pool, target, *(["target.group_field=subtask"] if groups > 1 else []))
    manifest = json.loads((directory / "output" / "manifest.json").read_text())
    tokens = manifest["stages"]["score"]["tokens"]
    (entry,) = (directory / "store" / "score").iterdir()
    sizes = {path.name: path.stat().st_size for path in entry.iterdir()}
    shards = sum(size for name, size in sizes.items() if name.startswith("similarity-"))
    return {
        "ratio": shards / tokens, "wanted": f"<= {6 + 2 * groups} bytes a token", "records": number, "groups": groups,
        "tokens": tokens, "whole_entry_bytes_a_token": sum(sizes.values()) / tokens, "files": len(sizes), **took,
        "stages": {name: stage["seconds"] for name, stage in manifest["stages"].items()},
    }  # fmt: skip


def cells() -> dict[str, Any]:
    """A sweep of 200 jobs over one pool of 2,000 records with the tiny model: passes that it takes."""
    directory, pool, target = files("cells", materials.pool_lines()[:2000])
    took = selection(
        directory, pool, target, f"pooler={','.join(POOLERS)}", f"fallback.penalty={','.join(map(str, PENALTIES))}",
        f"selection.count={','.join(map(str, COUNTS))}", multirun=True,
    )  # fmt: skip
    manifests = [json.loads(path.read_text()) for path in sorted((directory / "output").glob("*/manifest.json"))]
    passes = sum(len(list(path.iterdir())) for path in (directory / "store").glob("score"))
    return {"ratio": passes, "wanted": "1 pass", "jobs": len(manifests), **took}


def large_page() -> dict[str, Any]:
    """The report of 5,000 picked records of 10,000: seconds until Chromium has opened it."""
    directory, pool, target = files("large_page", materials.pool_lines()[:10_000])
    took = selection(directory, pool, target, "selection.count=5000")
    page = directory / "output" / "report.html"
    facts = {"wanted": "< 5 s", "page_mb": round(page.stat().st_size / 1e6, 1), **took}
    browser = next((found for found in map(shutil.which, CHROMIUM) if found), None)
    if browser is None:
        return {"ratio": None, "note": "no Chromium here: not opened", **facts}
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = started.new_page()
        tab.set_default_timeout(120_000)
        moments = []
        for action in (
            lambda: (tab.goto(page.as_uri()), tab.wait_for_selector("#records li")),
            lambda: tab.fill("#search", "the"),
            lambda: tab.click("#last"),
        ):
            begun = time.perf_counter()
            action()
            moments.append(round(time.perf_counter() - begun, 2))
        listed = tab.inner_text("#found")
        started.close()
    return {"ratio": moments[0], "search_s": moments[1], "last_page_s": moments[2], "found": listed, **facts}
