"""From a plan to time, memory and disk: run a sample of each kind of work on this machine."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from trim_lightning.store import Cost, Measured
from trim_lightning.sweep.plan import Plan

JOB_SECONDS = 0.3  # what a job takes besides its stages, once imports are done: reading, pooling, writing
JOB_SECONDS_PER_RECORD = 2e-5  # and for each record of its pool


@dataclass(frozen=True)
class Estimate:
    """What a plan will take on this machine.

    Attributes:
        speeds: Of each kind of work, by `Cost.speed`.
        loading: Seconds for loading the models, imports included.
        memory: Peak bytes of this process while measuring, which the run will about need.
        accelerator: Peak bytes on the accelerator while measuring; None without one.
        measuring: Seconds that the samples took.
    """

    speeds: dict[Hashable, Measured]
    loading: float
    memory: int
    accelerator: int | None
    measuring: float

    def seconds(self, cost: Cost) -> float | None:
        """Of one piece of work; None if it cannot be said."""
        measured = self.speeds.get(cost.speed) if cost.measure is not None else None
        if measured is None:
            return None
        return cost.tokens / measured.tokens_per_second / cost.devices

    def written(self, cost: Cost) -> float:
        """Bytes that a result will take in the store."""
        measured = self.speeds.get(cost.speed) if cost.measure is not None else None
        return 0.0 if measured is None else cost.tokens * measured.bytes_per_token

    def total(self, plan: Plan, opening: float) -> float:
        """Seconds of the whole run on this machine, one job after another.

        Args:
            plan: The plan.
            opening: Seconds that going through the jobs took, which the run repeats.
        """
        stages = sum(self.seconds(cost) or 0.0 for cost in plan.passes)
        jobs = plan.jobs - len(plan.problems)
        return opening + self.loading + stages + jobs * (JOB_SECONDS + JOB_SECONDS_PER_RECORD * plan.pool_records)


def estimate(plan: Plan) -> Estimate:
    """Load each model that the plan needs once, and run a sample of each kind of work on it.

    Raises:
        UserError: if a model cannot be loaded or run.
    """
    kinds: dict[Hashable, Cost] = {}
    for cost in plan.missing:
        if cost.measure is not None:
            kinds.setdefault(cost.speed, cost)
    speeds: dict[Hashable, Measured] = {}
    loading = measuring = 0.0
    held: tuple[Any, Any] | None = None
    for speed, cost in sorted(kinds.items(), key=lambda item: order_of(item[1])):
        started = time.perf_counter()
        assert cost.recipe is not None
        assert cost.measure is not None
        recipe = cost.recipe()
        identity = (recipe.source.digest, recipe.dtype)
        if held is None or held[0] != identity:
            held = None  # before the next is loaded
            held = (identity, recipe.load())
        loaded = time.perf_counter()
        speeds[speed] = cost.measure(held[1])
        loading += loaded - started
        measuring += time.perf_counter() - loaded
    return Estimate(speeds, loading, peak_memory(), peak_accelerator_memory(), measuring)


def order_of(cost: Cost) -> tuple[str, bool, str]:
    """Kinds of one model together, full training at the end, for it changes the weights."""
    model, dtype, *kind = cost.speed if isinstance(cost.speed, tuple) else ("", "", cost.speed)
    return f"{model}{dtype}", "full" in str(kind), str(kind)


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
