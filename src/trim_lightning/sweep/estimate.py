"""From a plan to time, memory and disk: measure each model's forward pass on this machine, and compute the rest."""

from __future__ import annotations

import importlib
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trim_lightning.errors import UserError, first_line
from trim_lightning.store import Cost
from trim_lightning.sweep.plan import Plan

if TYPE_CHECKING:
    from trim_lightning.sweep.work import TrainingNeed

JOB_SECONDS = 0.3  # what a job takes besides its stages, once imports are done: reading, pooling, writing
JOB_SECONDS_PER_RECORD = 2e-5  # and for each record of its pool


@dataclass
class Estimate:
    """What a plan will take on this machine.

    Attributes:
        times: Seconds of each piece of work on this machine.
        sizes: Bytes that its result will take in the store.
        trainings: What the backward passes need.
        failed: Why a piece of work could not be measured.
        importing: Seconds of imports.
        loading: Seconds of loading each model, by `Cost.model`.
        beside: Bytes of each piece of work on each device beyond those of a forward pass of the whole model.
        processes: The most that run on one machine.
        memory: Bytes that the run will about need on each machine.
        accelerator: Bytes on each accelerator; None without one.
        measuring: Seconds that the samples took.
    """

    times: dict[Cost, float] = field(default_factory=dict)
    sizes: dict[Cost, float] = field(default_factory=dict)
    trainings: dict[Cost, TrainingNeed] = field(default_factory=dict)
    failed: dict[Cost, str] = field(default_factory=dict)
    importing: float = 0.0
    loading: dict[Hashable, float] = field(default_factory=dict)
    beside: dict[Cost, float] = field(default_factory=dict)
    processes: int = 1
    memory: int = 0
    accelerator: int | None = None
    measuring: float = 0.0

    def load_seconds(self, plan: Plan) -> float:
        """Seconds of loading models: each once, and again for each work that loads its own."""
        known = [cost for cost in plan.passes if cost.model in self.loading]
        once = {cost.model for cost in known if not cost.loads}
        again = [cost.model for cost in known if cost.loads]
        return self.importing + sum(self.loading[model] for model in [*once, *again])

    def total(self, plan: Plan, opening: float) -> float:
        """Seconds of the whole run on this machine, one job after another.

        Going through the jobs took ``opening`` seconds, which the run repeats.
        """
        stages = sum(self.times.get(cost, 0.0) for cost in plan.passes)
        jobs = plan.jobs - len(plan.problems)
        each = JOB_SECONDS + JOB_SECONDS_PER_RECORD * plan.pool_records
        return opening + self.load_seconds(plan) + stages + jobs * each


def estimate(plan: Plan) -> Estimate:
    """Load each model that the plan needs once, measure its forward pass, and compute what the work takes.

    Work that fails is noted with its reason; the jobs that need it will most likely fail in the same way.
    """
    found = Estimate()
    groups: dict[Hashable, dict[int, list[Cost]]] = defaultdict(lambda: defaultdict(list))
    for cost in plan.missing:
        if cost.load is not None:
            groups[cost.model][cost.tokens_per_batch].append(cost)
    started = time.perf_counter()
    if groups:
        importlib.import_module("trim_lightning.models.load")
    found.importing = time.perf_counter() - started
    for name, by_batch in groups.items():
        every = [cost for costs in by_batch.values() for cost in costs]
        with noting(found, every):
            started = time.perf_counter()
            assert every[0].load is not None
            model = every[0].load()
            loaded = time.perf_counter()
            found.loading[name] = loaded - started
            for costs in by_batch.values():
                with noting(found, costs):
                    measure(found, costs, model)
            found.measuring += time.perf_counter() - loaded
        model = None  # before the next is loaded
    found.memory, found.accelerator = peak_memory(), peak_accelerator_memory()
    found.processes = max((cost.per_machine for cost in found.beside), default=1)
    if found.accelerator is None:
        each = [cost.per_machine * (found.memory + beside) for cost, beside in found.beside.items()]
        found.memory = int(max(each, default=found.memory))
    else:
        found.memory *= found.processes
        found.accelerator += int(max(found.beside.values(), default=0))
    return found


@contextmanager
def noting(found: Estimate, costs: Iterable[Cost]) -> Iterator[None]:
    """Note what goes wrong within it as the reason why these cannot be measured."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"internal failure ({first_line(error)})"
        found.failed.update(dict.fromkeys(costs, reason))


def measure(found: Estimate, costs: Sequence[Cost], model: Any) -> None:
    """Note the amounts of works that run the model on batches of one size.

    The records of the largest of them give the sample; answers are timed where the first that needs them has its.
    """
    from trim_lightning.engine.speed import forward_seconds
    from trim_lightning.evaluation.generation import BATCH, decoding_seconds
    from trim_lightning.sweep.work import factor_of, held_bytes, kind_of, sharing, training_need
    from trim_lightning.tuning.memory import weight_bytes

    largest = max(costs, key=lambda cost: cost.tokens)
    forward = forward_seconds(model, largest.records, largest.tokens_per_batch)
    decoding: tuple[float, float] | None = None
    for cost in costs:
        with noting(found, [cost]):
            if cost.work in ("lora training", "full training") and not cost.tokens:
                raise UserError(f"{cost.stage}: none of the records has a response to learn from")
            need = training_need(cost, model)
            if need is not None:
                found.trainings[cost] = need
            held = held_bytes(cost, model) - weight_bytes(model, model.device)
            found.beside[cost] = held + (0 if need is None else need.bytes)
            factor = factor_of(cost, need is not None and need.micro.recomputes)
            seconds = cost.tokens * cost.computed() * forward * factor * cost.depth / sharing(cost, model)
            if cost.answers and cost.tokens:
                decoding = decoding or decoding_seconds(model, cost.records)
                batches = math.ceil(cost.answers / BATCH)
                seconds += batches * (decoding[0] + decoding[1] * (cost.answer_tokens - 1))
            found.sizes[cost], found.times[cost] = kind_of(cost).written(cost, model, need), seconds


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
