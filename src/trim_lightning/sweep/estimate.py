"""From a plan to time, memory and disk: run a sample of each kind of work on this machine."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from trim_lightning.errors import UserError, first_line
from trim_lightning.store import Cost, Measured
from trim_lightning.sweep.plan import Plan

JOB_SECONDS = 0.3  # what a job takes besides its stages, once imports are done: reading, pooling, writing
JOB_SECONDS_PER_RECORD = 2e-5  # and for each record of its pool


@dataclass
class Estimate:
    """What a plan will take on this machine.

    Attributes:
        speeds: Of each kind of work, by `Cost.speed`.
        failed: Why a kind of work could not be measured.
        importing: Seconds of imports.
        loading: Seconds of loading its model, for each kind of work.
        models: Which model that is.
        memory: Peak bytes of this process while measuring, which the run will about need.
        accelerator: Peak bytes on the accelerator while measuring; None without one.
        measuring: Seconds that the samples took.
    """

    speeds: dict[Hashable, Measured] = field(default_factory=dict)
    failed: dict[Hashable, str] = field(default_factory=dict)
    importing: float = 0.0
    loading: dict[Hashable, float] = field(default_factory=dict)
    models: dict[Hashable, Any] = field(default_factory=dict)
    memory: int = 0
    accelerator: int | None = None
    measuring: float = 0.0

    def seconds(self, cost: Cost) -> float | None:
        """Of one piece of work; None if it cannot be said."""
        measured = self.speeds.get(cost.speed) if cost.measure is not None else None
        if measured is None:
            return None
        return cost.tokens / measured.tokens_per_second / cost.devices

    def written(self, cost: Cost) -> float:
        """Bytes that a result will take in the store."""
        measured = self.speeds.get(cost.speed) if cost.measure is not None else None
        return 0.0 if measured is None else cost.tokens * measured.bytes_per_token + measured.bytes_beside

    def load_seconds(self, plan: Plan) -> float:
        """Seconds of loading models: each once, and again for each work that loads its own."""
        known = [cost for cost in plan.passes if cost.speed in self.loading]
        once = {self.models[cost.speed]: self.loading[cost.speed] for cost in known if not cost.loads}
        again = sum(self.loading[cost.speed] for cost in known if cost.loads)
        return self.importing + sum(once.values()) + again

    def total(self, plan: Plan, opening: float) -> float:
        """Seconds of the whole run on this machine, one job after another.

        Args:
            plan: The plan.
            opening: Seconds that going through the jobs took, which the run repeats.
        """
        stages = sum(self.seconds(cost) or 0.0 for cost in plan.passes)
        jobs = plan.jobs - len(plan.problems)
        each = JOB_SECONDS + JOB_SECONDS_PER_RECORD * plan.pool_records
        return opening + self.load_seconds(plan) + stages + jobs * each


def estimate(plan: Plan) -> Estimate:
    """Load each model that the plan needs once, and run a sample of each kind of work on it.

    A kind that fails is noted with its reason; the jobs that need it will most likely fail in the same way.
    """
    kinds: dict[Hashable, Cost] = {}
    for cost in plan.missing:
        if cost.measure is not None:
            kinds.setdefault(cost.speed, cost)
    found = Estimate()
    held: tuple[Any, Any] | None = None
    took = 0.0
    for speed, cost in sorted(kinds.items(), key=lambda item: order_of(item[1])):
        assert cost.recipe is not None
        assert cost.measure is not None
        try:
            started = time.perf_counter()
            recipe = cost.recipe()
            found.importing += time.perf_counter() - started
            if held is None or held[0] != recipe.identity:
                held = None  # before the next is loaded
                started = time.perf_counter()
                held = (recipe.identity, recipe.load())
                took = time.perf_counter() - started
            found.loading[speed], found.models[speed] = took, recipe.identity
            started = time.perf_counter()
            found.speeds[speed] = cost.measure(held[1])
            found.measuring += time.perf_counter() - started
        except Exception as error:
            found.failed[speed] = (
                str(error) if isinstance(error, UserError) else f"internal failure ({first_line(error)})"
            )
            held = None  # a sample that broke off may have left anything
        if cost.spoils:
            held = None
    found.memory, found.accelerator = peak_memory(), peak_accelerator_memory()
    return found


def order_of(cost: Cost) -> tuple[str, bool, str]:
    """Kinds of one model together, and at the end what changes its weights."""
    model = cost.speed[:2] if isinstance(cost.speed, tuple) else ()
    return str(model), cost.spoils, str(cost.speed)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def peak_accelerator_memory() -> int | None:
    """Largest memory on the accelerator so far, in bytes."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return int(torch.cuda.max_memory_allocated())
