"""``make bench``: every figure in a process of its own, one after the other; a table, and JSON in ``build/bench``.

``python benchmarks/run.py engine padding`` takes only those. Nothing else should run meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

import materials
from figures import FIGURES

SLOW = (
    "million",
    "stored",
    "six_million",
    "cells",
    "large_page",
    "sweep",
    "estimate",
    "cascade",
)  # only by name: they take longer than all others together


def main(names: list[str]) -> int:
    """Run the figures and write what they printed; 1 if one of them failed."""
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        print(f"error: {', '.join(unknown)}: no such figure; there are {', '.join(FIGURES)}", file=sys.stderr)
        return 2
    results, failed = {}, []
    for name in names or [name for name in FIGURES if name not in SLOW]:
        started = time.perf_counter()
        figures = Path(__file__).with_name("figures.py")
        run = subprocess.run([sys.executable, str(figures), name], stdout=subprocess.PIPE, text=True)
        if run.returncode:
            failed.append(name)
            continue
        took = round(time.perf_counter() - started, 1)
        results[name] = {**json.loads(run.stdout.splitlines()[-1]), "took": took, "machine": materials.machine()}
        print(f"{name}: {results[name]['ratio']} (wanted {results[name]['wanted']})", file=sys.stderr, flush=True)
    file = materials.WORK / "results.json"
    earlier = json.loads(file.read_text())["figures"] if file.exists() else {}
    content = {"figures": {**earlier, **results}}
    file.write_text(json.dumps(content, indent=1) + "\n")
    rows = [
        [name, (FIGURES[name].__doc__ or "").strip(), result["ratio"], result["wanted"]]
        for name, result in results.items()
    ]
    if rows:
        print(tabulate(rows, headers=["figure", "what", "value", "wanted"], floatfmt=".3f", maxcolwidths=[None, 60]))
        print(f"\nmachine: {json.dumps(materials.machine())}\nfile: {file.relative_to(materials.ROOT)}")
    for name in failed:
        print(f"error: figure {name} failed; its traceback is above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
