"""A trace of the scoring pass and its memory over time, taken with `torch.profiler` on a few batches."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from trim_lightning.engine.batches import Shard, plan_shards
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.modules import ScoringPass
from trim_lightning.engine.prefixes import prefix_groups
from trim_lightning.engine.scoring_pass import ScoringRequest, error_scopes
from trim_lightning.engine.sharded_pass import run_sharded_pass
from trim_lightning.engine.token_shards import TokenShards
from trim_lightning.files.atomic import write_atomically
from trim_lightning.tokens.tokenized import TokenizedRecords

BATCHES = 8  # enough to see the rhythm; a trace grows by megabytes a batch
TRACE, MEMORY, OPERATORS = "trace.json.gz", "memory.csv", "operators.txt"


def profile_scoring(
    model: PreTrainedModel,
    records: TokenizedRecords,
    request: ScoringRequest,
    directory: Path,
    *,
    resources: Resources,
    share_prefixes: bool = False,
) -> int:
    """Run the scoring pass over some batches once more under the profiler; its results are thrown away.

    The batches are spread evenly over the plan, from the longest records to the shortest. One runs before the trace
    begins, so that what happens only once is not in it. Prefixes are shared as in the pass itself. A pass of one device
    and this process is profiled, whatever ``resources`` name. The directory gets ``trace.json.gz`` (Chrome's trace
    format), ``memory.csv`` and ``operators.txt``.

    Returns:
        Number of batches in the trace.
    """
    resources = resources.alone()
    groups = prefix_groups(records, resources.tokens_per_batch) if share_prefixes else None
    plan = plan_shards(records.lengths, resources.tokens_per_batch, groups=groups)
    batches = [rows for shard in plan for rows in shard.batches]
    number = min(BATCHES, len(batches))
    chosen = [batches[place * len(batches) // number] for place in range(number)]
    if not chosen:
        return 0
    # a pass takes the model out of its module at its end, so each has one of its own, made outside the trace
    banks = [(bank, request.nearest) for bank in request.banks.values()]
    modules = [
        ScoringPass(
            model,
            banks,
            share_prefixes=share_prefixes,
            error_scopes=error_scopes([request]),
            targets=list(request.targets.values()),
            states=request.states,
        )
        for _ in range(2)
    ]

    def run(part: Sequence[tuple[int, ...]]) -> None:
        tokens = int(sum(records.lengths[list(rows)].sum() for rows in part))
        with tempfile.TemporaryDirectory() as nowhere:
            form = TokenShards(
                Path(nowhere),
                len(request.banks),
                request.scope,
                request.nearest,
                errors=request.errors,
                targets=range(len(request.targets)),
                states=request.states,
            )
            plan = [Shard(0, tuple(part), tokens)]
            run_sharded_pass(modules.pop(), records, plan, form, Path(nowhere), resources=resources, title="profile")

    run(chosen[:1])
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, profile_memory=True, record_shapes=True) as profiler:
        run(chosen)
    trace = trace_of(profiler)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / TRACE, gzip.compress(json.dumps(trace).encode(), mtime=0))
    write_atomically(directory / MEMORY, memory_lines(trace["traceEvents"]))
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    write_atomically(directory / OPERATORS, profiler.key_averages().table(sort_by=order, row_limit=40) + "\n")
    return len(chosen)


def trace_of(profiler: profile) -> dict[str, Any]:
    """The trace in Chrome's format, without the name of the file that it was read from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    trace.pop("traceName", None)
    return trace


def memory_lines(events: Sequence[Mapping[str, Any]]) -> str:
    """The memory timeline as CSV: after every allocation and release what tensors hold on its device.

    ``seconds`` count from the first of them; ``device`` is ``cpu``, ``cuda:0`` …; ``bytes`` is by how much memory
    changed, ``allocated_bytes`` what is held then: on a GPU by all tensors, on the CPU by those that the profiler saw
    being made.

    Args:
        events: Events of a trace in Chrome's format; times in microseconds.
    """
    found = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: float(event["ts"]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["seconds", "device", "bytes", "allocated_bytes"])
    for event in found:
        values = event["args"]
        seconds = (float(event["ts"]) - float(found[0]["ts"])) / 1e6
        on_cpu = values["Device Type"] == 0
        device = "cpu" if on_cpu else f"cuda:{values['Device Id']}"
        writer.writerow([f"{seconds:.6f}", device, values["Bytes"], values["Total Allocated"]])
    return out.getvalue()
