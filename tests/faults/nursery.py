"""A process that has everything imported and runs each command in a child of its own, with a fault in it.

One JSON line in, one out. A child costs the run itself and not the seconds of imports. A fault has a ``point`` (a
function, or the system's ``rename`` and ``fsync``), the ``nth`` call of it, and an ``action``: a signal to itself, an
error, or ``count``. ``kill_after`` kills the child and its own after so many seconds, wherever it is.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SYSTEM = {"rename": (("os", "replace"), ("os", "rename")), "fsync": (("os", "fsync"),)}
STAGES = {
    "warm-up": "trim_lightning.tuning.lora_module:TuningModule.training_step",
    "target pass": "trim_lightning.engine.modules:TargetPass.on_batch",
    "scoring": "trim_lightning.engine.modules:ScoringPass.on_batch",
    "selection": "trim_lightning.files.atomic:replacing",
    "training": "trim_lightning.tuning.lora_module:TuningModule.training_step",
    "evaluation": "trim_lightning.engine.record_pass:RecordPass.on_batch",
    "report": "trim_lightning.report.selection_page:gather",
}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


class Fault:
    """Counts calls and strikes at the one that is asked for."""

    def __init__(self, nth: int, action: str, note: Path) -> None:
        self.nth, self.action, self.note, self.calls = nth, action, note, 0

    def __call__(self, path: str | None) -> None:
        """One more call."""
        self.calls += 1
        if self.action == "count" or self.calls != self.nth:
            return
        self.note.write_text(str(time.monotonic()))
        if self.action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.action])
            time.sleep(0.05)  # until the interpreter has seen it
        elif self.action == "worker":
            import multiprocessing

            multiprocessing.active_children()[0].kill()
            time.sleep(0.05)
        elif self.action == "memory":
            import torch

            torch.empty(1 << 60, dtype=torch.uint8)
        else:
            number = getattr(errno, self.action)
            raise OSError(number, os.strerror(number), path)


def plant(point: str, fault: Fault) -> None:
    """Let a function call the fault before it does its work."""
    places = SYSTEM.get(point)
    if places is None:
        module, _, names = STAGES[point].partition(":")
        owner: Any = importlib.import_module(module)
        *outer, name = names.split(".")
        for part in outer:
            owner = getattr(owner, part)
        wrap(owner, name, fault)
        return
    for module, name in places:
        wrap(importlib.import_module(module), name, fault)


def wrap(owner: Any, name: str, fault: Fault) -> None:
    """Replace ``owner.name``."""
    original: Callable[..., Any] = getattr(owner, name)

    def struck(*arguments: Any, **keywords: Any) -> Any:
        last = arguments[-1] if arguments else None
        fault(str(last) if isinstance(last, str | Path) else None)
        return original(*arguments, **keywords)

    setattr(owner, name, struck)


def run(job: dict[str, Any]) -> int:
    """In the child: the command, with its fault."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
    os.chdir(job["cwd"])
    os.environ.update(job.get("environment", {}))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from trim_lightning.cli import hydra_app as cli

    if job.get("clock"):
        shift, now = float(job["clock"]), time.time
        time.time = lambda: now() + shift
    fault = None
    if job.get("fault"):
        asked = job["fault"]
        fault = Fault(int(asked.get("nth", 0)), asked["action"], Path(job["note"]))
        plant(asked["point"], fault)
    sys.argv = [job["program"], *job["arguments"]]
    code = {"trim-train": cli.train_main, "trim-select": cli.select_main}[job["program"]]()
    if fault is not None and fault.action == "count":
        Path(job["note"]).write_text(str(fault.calls))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def child_of(job: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and say how it ended."""
    pid = os.fork()
    if pid == 0:
        code = 99
        with contextlib.suppress(BaseException):
            os.setsid()
            code = run(job)
        os._exit(code)
    began = time.monotonic()
    deadline, end = began + job["seconds"], began + job.get("kill_after", math.inf)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {"code": os.waitstatus_to_exitcode(status), "hung": False, "ended": time.monotonic()}
        if time.monotonic() > end:
            end = math.inf
            os.killpg(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"code": None, "hung": True, "ended": time.monotonic()}
        time.sleep(0.01)


def main() -> None:
    """Import all that a run needs, then serve."""
    import torch

    torch.set_num_threads(1)
    for name in (
        "pipeline.train",
        "methods.trim",
        "report.selection_page",
        "tuning.run",
        "evaluation.evaluate",
        "cli.hydra_app",
    ):
        importlib.import_module(f"trim_lightning.{name}")
    for name in ("peft", "transformers.models.llama.modeling_llama", "pandas", "scipy.stats"):
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(child_of(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
