"""A plan and its estimate as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from trim_lightning.console.amounts import size_text, time_text
from trim_lightning.sweep.estimate import Estimate
from trim_lightning.sweep.plan import Plan

if TYPE_CHECKING:
    from trim_lightning.sweep.work import TrainingNeed

ORDER = ("warmup", "fingerprint", "cascade", "score", "finetune", "evaluate_before", "evaluate_after")
SHOWN = 3  # jobs named with one reason
HEADERS = ["stage", "results", "in the store", "to build", "passes", "tokens", "tokens/s", "seconds", "disk"]


def plan_text(plan: Plan, estimated: Estimate, opening: float, names: Mapping[int, str] | None = None) -> str:
    """The plan as a table, and what it will take in all, ``opening`` seconds of going through the jobs included."""

    def named(number: int) -> str:
        return f" ({names[number]})" if names and number in names else ""

    jobs = f"{plan.jobs} jobs" if plan.jobs != 1 else "1 job"
    without = f", without the {len(plan.problems)} that cannot run" if plan.problems else ""
    parts = [f"plan of {jobs}{without}; nothing but reading, tokenising and measuring has been done"]
    lines = [stage_line(stage, stage_totals(stage, plan, estimated)) for stage in stages_of(plan)]
    if lines:
        align = ("left", *["right"] * (len(HEADERS) - 1))
        parts.append(tabulate(lines, headers=HEADERS, tablefmt="simple", disable_numparse=True, colalign=align))
    else:
        parts.append("no costly stage is needed" if plan.jobs > len(plan.problems) else "no job can run")
    total = estimated.total(plan, opening)
    disk = sum(estimated.sizes.get(cost, 0.0) for cost in plan.missing)
    several = estimated.processes > 1
    memory = f"{size_text(estimated.memory)} of memory" + f" for {estimated.processes} processes" * several
    if estimated.accelerator:
        memory += f", {size_text(estimated.accelerator)} on {'each' if several else 'the'} accelerator"
    loading = time_text(estimated.load_seconds(plan))
    line = f"in all about {time_text(total)} ({loading} of it for imports and loading models)"
    if estimated.times:
        line += f", {memory}, {size_text(disk)} of disk in {plan.store.name or 'the stores'}"
        line += f"; measured in {estimated.measuring:.0f} s on this machine"
    if plan.jobs > len(plan.problems):
        parts.append(line)
    assumed = unique(cost.assumed for cost in plan.missing if cost.assumed)
    unknown = unique(cost.stage for cost in plan.missing if cost.load is None)
    largest = {cost.stage: need for cost, need in sorted(estimated.trainings.items(), key=lambda item: item[1].bytes)}
    if largest:
        parts.append("\n".join(training_line(stage, need) for stage, need in largest.items()))
    if assumed:
        parts.append(f"assumed: {'; '.join(assumed)}")
    if unknown:
        parts.append(f"not in the estimate: {', '.join(unknown)}")
    for problem in unique(plan.problems.values()):
        numbers = [number for number, reason in plan.problems.items() if reason == problem]
        which = ", ".join(f"#{number}{named(number)}" for number in numbers[:SHOWN])
        more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
        parts.append(f"cannot run: {which}{more}: {problem}")
    return "\n\n".join(parts)


def plan_dict(plan: Plan, estimated: Estimate, opening: float) -> dict[str, Any]:
    """The same as JSON-able values: seconds, bytes, tokens; null where something cannot be said."""
    return {
        "jobs": plan.jobs,
        "problems": {str(number): problem for number, problem in plan.problems.items()},
        "stages": {stage: stage_totals(stage, plan, estimated) for stage in stages_of(plan)},
        "seconds": estimated.total(plan, opening),
        "loading_seconds": estimated.load_seconds(plan),
        "memory_bytes": estimated.memory,
        "accelerator_bytes": estimated.accelerator,
        "training": [
            {
                "stage": cost.stage,
                "bytes": need.bytes,
                "room_bytes": need.room,
                "devices": need.devices,
                "weight_bytes": need.weights,
                "tokens_per_micro_batch": need.micro.tokens,
                "gradient_checkpointing": need.micro.recomputes,
            }
            for cost, need in estimated.trainings.items()
        ],
        "disk_bytes": sum(estimated.sizes.get(cost, 0.0) for cost in plan.missing),
    }


def training_line(stage: str, need: TrainingNeed) -> str:
    """What a stage's largest training needs beside the model's weights, and whether there is room for it."""
    recomputed = ", activations recomputed" if need.micro.recomputes else ""
    where, weights = "", "the weights"
    if need.devices > 1:
        where, weights = f"on each of {need.devices} devices ", f"{size_text(need.weights)} of weights"
    line = (
        f"{stage}: {where}its backward passes need {size_text(need.bytes)} beside {weights} (micro-batches of up to "
        f"{need.micro.tokens:,} tokens{recomputed})"
    )
    if need.bytes <= need.room:
        return line
    return f"{line}, more than the {size_text(max(0, need.room))} that this device has for them: lower max_length"


def stages_of(plan: Plan) -> list[str]:
    """Names of the stages in the order of need."""
    names = unique(wanted.cost.stage for wanted in plan.wanted if wanted.cost is not None)
    return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def stage_totals(stage: str, plan: Plan, estimated: Estimate) -> dict[str, Any]:
    """What one stage needs: results, passes, tokens, seconds (None if they cannot be said), bytes."""
    wanted = [item for item in plan.wanted if item.cost is not None and item.cost.stage == stage]
    passes = [cost for cost in plan.passes if cost.stage == stage]
    seconds = [estimated.times.get(cost) for cost in passes]
    return {
        "results": len(wanted),
        "stored": sum(item.found for item in wanted),
        "passes": len(passes),
        "tokens": sum(cost.tokens for cost in passes),
        "seconds": None if None in seconds else sum(value for value in seconds if value is not None),
        "bytes": sum(estimated.sizes.get(cost, 0.0) for cost in plan.missing if cost.stage == stage),
        "assumed": unique(cost.assumed for cost in passes if cost.assumed),
    }


def stage_line(stage: str, totals: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    tokens, seconds = totals["tokens"], totals["seconds"]
    return [
        stage,
        str(totals["results"]),
        str(totals["stored"]),
        str(totals["results"] - totals["stored"]),
        str(totals["passes"]),
        f"{tokens:,}" if tokens else "",
        f"{tokens / seconds:,.0f}" if seconds and tokens else "",
        "unknown" if seconds is None else f"{seconds:.1f}",
        size_text(totals["bytes"]) if totals["bytes"] else "",
    ]


def unique(texts: Iterable[str]) -> list[str]:
    """Each text once, in order."""
    return list(dict.fromkeys(texts))
