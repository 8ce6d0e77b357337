"""Measure an evaluation by running a part of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from trim_lightning.engine.batches import ShardBatches, plan_shards
from trim_lightning.engine.record_statistics import ResponseLoss
from trim_lightning.engine.speed import spread_out
from trim_lightning.evaluation.generation import BATCH, answer_prompts, continuations, end_tokens, plain_generation
from trim_lightning.records.record_file import RecordFile
from trim_lightning.settings.schema import EvaluationSettings
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store.cost import Measured
from trim_lightning.tokens.tokenized import TokenizedRecords

LOSS_BATCHES = 3
STEPS = 8  # generated tokens


def sample_evaluation(
    trainee: Trainee,
    model: Any,
    held_out: RecordFile,
    tokens: TokenizedRecords,
    plan: Mapping[str, bool],
    settings: EvaluationSettings,
) -> Measured:
    """Speed of an evaluation, per token of the held-out records.

    Answers are taken to be as long as ``max_new_tokens`` lets them be, for how long they get is not known before.
    """
    model = trainee.placed(model)
    seconds = loss_seconds(model, tokens, trainee.tokens_per_batch)
    if plan["option_accuracy"]:
        seconds *= 1 + mean_options(held_out)
    if plan["exact_match"]:
        seconds += answer_seconds(trainee, model, held_out, tokens, settings)
    return Measured(tokens.total_tokens / max(seconds, 1e-9))


def loss_seconds(model: Any, tokens: TokenizedRecords, tokens_per_batch: int) -> float:
    """Seconds of one pass for the loss over all records, from a few batches."""
    import torch

    batches = ShardBatches(tokens, plan_shards(tokens.lengths, tokens_per_batch), "response")
    statistic = ResponseLoss()
    chosen = spread_out(range(len(batches)), LOSS_BATCHES)
    started = time.perf_counter()
    with torch.no_grad():
        for number, place in enumerate([0, *chosen]):  # the longest records first: memory peaks in them
            if number == 1:  # the first paid for what happens once
                started = time.perf_counter()
            batch = batches[place]
            statistic(model, {name: batch[name].to(model.device) for name in ("input_ids", "roles")}).tolist()
    return (time.perf_counter() - started) / len(chosen) * len(batches)


def mean_options(held_out: RecordFile) -> float:
    """Mean number of ``choices`` of the held-out records."""
    return float(np.mean([len(held_out.object(row).get("choices") or []) for row in range(len(held_out))]))


def answer_seconds(
    trainee: Trainee, model: Any, held_out: RecordFile, tokens: TokenizedRecords, settings: EvaluationSettings
) -> float:
    """Seconds of all answers at their longest, from a few generated tokens of one batch."""
    rows = [row for row in range(len(held_out)) if held_out.object(row).get("answer") is not None]
    prompts = answer_prompts(held_out, tokens, rows, trainee.renderer, trainee.max_length)
    if not prompts:
        return 0.0
    ordered = sorted(prompts.values(), key=len)
    middle = max(0, (len(ordered) - BATCH) // 2)
    batch = ordered[middle : middle + BATCH]
    ends = end_tokens(tokens, trainee.tokenizer)

    def run(steps: int) -> float:
        started = time.perf_counter()
        continuations(model, batch, ends[:0], steps)  # without end tokens, so that none stops early
        return time.perf_counter() - started

    with plain_generation(model):
        run(1)
        first, more = run(1), run(1 + STEPS)
    step = max(0.0, more - first) / STEPS
    batches = -(-len(prompts) // BATCH)
    return batches * (first + step * (settings.max_new_tokens - 1))
