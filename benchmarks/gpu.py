"""``make gpu``: what only a GPU can show, part by part; each in a process of its own, merged into one JSON file.

python benchmarks/gpu.py                 # the parts that this card has not had yet, in order
python benchmarks/gpu.py agree bytes     # only these, anew
python benchmarks/gpu.py minutes=9       # begin no part that could not end within so many minutes
python benchmarks/gpu.py tiny            # small shapes, on the CPU if need be: does everything run through?
python benchmarks/gpu.py table           # the section for docs/benchmarks.md
python benchmarks/gpu.py file=FILE       # where the results are (build/gpu/results.json)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gpu_checks
import gpu_runs
import gpu_speed
from gpu_materials import Place, environment, quiet
from gpu_table import machine, merge, read, section
from materials import ROOT, WORK
from trim_lightning.files.atomic import write_text

LIMIT = 480  # seconds of one part
LEAST = 30  # seconds that a part is begun with
HERE = ROOT / "build" / "gpu"

PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "agree": gpu_checks.agree,
    "bytes": gpu_checks.same_bytes,
    "saliency_memory": gpu_checks.saliency_memory,
    "out_of_memory": gpu_checks.out_of_memory,
    "scoring_1b": gpu_speed.scoring_1b,
    "scoring_7b": gpu_speed.scoring_7b,
    "training": gpu_speed.training,
    "less": gpu_speed.less,
    "end_to_end": gpu_runs.end_to_end,
    "nccl": gpu_runs.nccl,
    "fsdp": gpu_runs.fsdp,
    "trl": gpu_speed.trl,
    "compiled": gpu_speed.compiled,
    "tests": gpu_runs.tests,
}


def place_of(tiny: bool) -> Place:
    """The GPU, or the CPU where there is none, and the kit's folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = HERE / ("tiny" if tiny else "work")
    for folder in (work, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    return Place(device, tiny, work)


def child(name: str, tiny: bool, answer: Path, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own, which is ended with all that it started when its time is over."""
    answer.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__)), "part", name, str(int(tiny)), str(answer)]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    try:
        code: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = round(time.perf_counter() - started, 1)
    if code == 0 and answer.exists():
        return {**json.loads(answer.read_text()), "took": took}
    why = f"not done after {limit:.0f} s" if code is None else f"failed (exit code {code}), see its output"
    return {"ok": False, "rows": [[(PARTS[name].__doc__ or name).split(":")[0], why, ""]], "took": took, "failed": True}


def part(name: str, tiny: str, answer: str) -> int:
    """What the process of a part does."""
    quiet()
    write_text(json.dumps(PARTS[name](place_of(bool(int(tiny))))), Path(answer))
    return 0


def main(arguments: list[str]) -> int:
    """Run parts; 1 if one of them failed or did not hold, 2 for arguments that mean nothing."""
    if arguments[:1] == ["part"]:
        return part(*arguments[1:])
    options = dict(word.split("=", 1) for word in arguments if "=" in word)
    words = [word for word in arguments if "=" not in word]
    names = [word for word in words if word not in ("tiny", "table")]
    unknown = [name for name in (*names, *options) if name not in (*PARTS, "minutes", "file")]
    if unknown:
        print(f"error: {', '.join(unknown)}: no such part; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    tiny = "tiny" in words
    file = Path(options.get("file", HERE / ("tiny.json" if tiny else "results.json")))
    if "table" in words:
        print(section(read(file), list(PARTS)))
        return 0
    if not tiny and not torch.cuda.is_available():
        print("error: no GPU here; `tiny` runs the kit on the CPU to see that it runs through", file=sys.stderr)
        return 2
    return run(names, tiny, file, 60 * float(options.get("minutes", "inf")))


def run(names: list[str], tiny: bool, file: Path, budget: float) -> int:
    """The parts of these names, or those that the file lacks for this card, while there is time."""
    on, started = machine(), time.perf_counter()
    there = read(file).get(on["card"], {"parts": {}})["parts"]
    chosen = names or [name for name in PARTS if tiny or there.get(name, {"failed": True}).get("failed")]
    print(json.dumps(on), flush=True)
    bad, left = [], []
    for name in chosen:
        limit = min(LIMIT, budget - (time.perf_counter() - started))
        if limit < LEAST:
            left.append(name)
            continue
        print(f"--- {name}: {(PARTS[name].__doc__ or '').strip().splitlines()[0]}", flush=True)
        result = child(name, tiny, place_of(tiny).work / f"{name}.answer.json", limit)
        merge(file, on, name, result)
        bad += [name] if result["ok"] is False else []
        for what, value, aim in result["rows"]:
            print(f"    {what}: {value}" + (f" (wanted {aim})" if aim else ""), flush=True)
        print(
            f"    {'held' if result['ok'] else 'measured' if result['ok'] is None else 'NOT HELD'}, {result['took']} s",
            flush=True,
        )
    print(f"file: {file}")
    if left:
        print(f"no time was left for {', '.join(left)}: the same command goes on with them")
    if bad:
        print(f"error: not as wanted: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
