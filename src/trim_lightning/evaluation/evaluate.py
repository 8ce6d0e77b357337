"""Evaluate one model on the held-out records: every number per record, through the store."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.records.record_file import RecordFile
from trim_lightning.settings.schema import EvaluationSettings
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import Entry, StageKey

RESULTS = "held_out.json"


def evaluate(
    trainee: Trainee, tuned: Entry | None, held_out: RecordFile, settings: EvaluationSettings, *, title: str
) -> list[dict[str, Any]]:
    """What the model does on each held-out record, before its fine-tuning where ``tuned`` is None.

    Returns:
        One dict per record: ``id``, ``num_tokens``, ``nll`` and, where they apply, ``prediction``, ``correct``,
        ``choice``, ``choice_correct``.

    Raises:
        UserError: if a measure is asked for that no record allows.
    """
    wanted = measures(held_out, settings)
    tokens, tokens_entry = trainee.tokenize(held_out, "tokenize")
    if not any(wanted.values()) and not (tokens.content_lengths("response") > 0).any():
        raise UserError(f"{held_out.place(0)}: no held-out record has a response, so there is nothing to measure")
    choices = {name: value for name, value in asdict(settings).items() if name in ("max_new_tokens", "stop")}
    key = StageKey(
        "evaluate",
        3,
        {**wanted, **(choices if wanted["exact_match"] else {})},
        {
            "held_out": tokens_entry.key.hex,
            "trainee": {"model": trainee.source.digest, "dtype": str(trainee.dtype)},
            "tuned": None if tuned is None else tuned.key.hex,
        },
    )

    def build(directory: Path) -> dict[str, Any]:
        model = trainee.model(tuned)
        started = time.perf_counter()
        results = measure_losses(trainee, model, held_out, tokens, directory, title)
        if wanted["option_accuracy"]:
            measure_options(trainee, model, held_out, results, directory, title)
        if wanted["exact_match"]:
            measure_answers(trainee, model, held_out, tokens, settings, results, title)
        (directory / RESULTS).write_text(json.dumps(results), encoding="utf-8")
        return {"seconds": time.perf_counter() - started, "tokens": tokens.total_tokens}

    more: dict[str, Any] = {}
    if wanted["option_accuracy"]:
        more["how_many"] = lambda: 1 + mean_options(held_out)
    if wanted["exact_match"]:
        more.update(how_many_answers=lambda: len(answered(held_out)), answer_tokens=settings.max_new_tokens)
        more["assumed"] = f"answers of {settings.max_new_tokens} tokens"
    cost = trainee.cost(f"evaluate_{title}", "evaluation", tokens, loads=True, **more)
    entry = trainee.store.get(key, build, cost=cost)
    trainee.ledger.book(f"evaluate_{title}", entry)
    results: list[dict[str, Any]] = json.loads((entry.path / RESULTS).read_text(encoding="utf-8"))
    return results


def answered(held_out: RecordFile) -> list[int]:
    """Rows of the records that have an ``answer``."""
    return [row for row in range(len(held_out)) if held_out.object(row).get("answer") is not None]


def mean_options(held_out: RecordFile) -> float:
    """Mean number of ``choices`` of the held-out records; a record without usable ones has none."""
    choices = (held_out.object(row).get("choices") for row in range(len(held_out)))
    return sum(len(found) for found in choices if isinstance(found, list)) / len(held_out)


def measures(held_out: RecordFile, settings: EvaluationSettings) -> dict[str, bool]:
    """Which measures apply: options where records have ``choices``, exact match where they have ``answer`` alone.

    Raises:
        UserError: if ``always`` is asked and the first record lacks the field.
    """
    from trim_lightning.evaluation.options import correct_option

    first = held_out.object(0)
    has_answer = first.get("answer") is not None
    has_options = has_answer and isinstance(first.get("choices"), list) and correct_option(first) is not None
    for name, wanted, possible, field in (
        ("exact_match", settings.exact_match, has_answer, "answer"),
        ("option_accuracy", settings.option_accuracy, has_options, "choices with its answer among them"),
    ):
        if wanted == "always" and not possible:
            raise UserError(f"evaluation.{name}=always: {held_out.place(0)} has no {field}; use auto")
    return {
        "exact_match": settings.exact_match == "always"
        or (settings.exact_match == "auto" and has_answer and not has_options),
        "option_accuracy": settings.option_accuracy != "never" and has_options,
    }


def measure_losses(
    trainee: Trainee, model: Any, held_out: RecordFile, tokens: Any, directory: Path, title: str
) -> list[dict[str, Any]]:
    """Summed response loss and response tokens of each record."""
    from trim_lightning.engine.response_loss import response_counts

    counts, losses = response_counts(tokens), summed_losses(trainee, model, tokens, directory, f"loss {title}")
    return [
        {"id": held_out.id(row), "num_tokens": int(counts[row]), "nll": float(losses[row])}
        for row in range(len(held_out))
    ]


def summed_losses(trainee: Trainee, model: Any, tokens: Any, directory: Path, title: str) -> NDArray[np.float64]:
    """``[records]`` summed response losses, on the trainee's devices."""
    from trim_lightning.engine.response_loss import response_losses

    options: dict[str, Any] = {"trainer": trainee.trainer, "tokens_per_batch": trainee.tokens_per_batch}
    return response_losses(model, tokens, **options, title=title, within=directory)


def measure_options(
    trainee: Trainee, model: Any, held_out: RecordFile, results: list[dict[str, Any]], directory: Path, title: str
) -> None:
    """Add ``choice`` and ``choice_correct`` to the results."""
    from trim_lightning.engine.response_loss import response_counts
    from trim_lightning.evaluation.options import LastResponses, correct_option, likeliest, write_option_records
    from trim_lightning.records.indexing import index
    from trim_lightning.records.record_file import LineSource, ReadOptions
    from trim_lightning.tokens.tokenized import tokenize_records

    file, folder = directory / "options.jsonl", directory / "options"
    lines = write_option_records(held_out, file)
    if not lines:
        return
    folder.mkdir()
    options = index(LineSource(file, label="options", name="options", what="evaluation"), ReadOptions())
    tokenize_records(options, trainee.renderer, trainee.max_length, folder, "options")
    tokens = LastResponses(folder)
    losses = summed_losses(trainee, model, tokens, directory, f"options {title}")
    whole = tokens.lengths < trainee.max_length  # a response that was cut cannot be compared
    for row, option in likeliest(lines, losses, np.where(whole, response_counts(tokens), 0)).items():
        results[row]["choice"] = option
        results[row]["choice_correct"] = option == correct_option(held_out.object(row))


def measure_answers(
    trainee: Trainee,
    model: Any,
    held_out: RecordFile,
    tokens: Any,
    settings: EvaluationSettings,
    results: list[dict[str, Any]],
    title: str,
) -> None:
    """Add ``answer``, ``prediction`` and ``correct`` to the results."""
    from trim_lightning.evaluation.answers import is_correct
    from trim_lightning.evaluation.generation import answer_prompts, end_tokens, generate_answers

    rows = answered(held_out)
    answers = generate_answers(
        trainee.placed(model),
        trainee.tokenizer,
        answer_prompts(held_out, tokens, rows, trainee.renderer, trainee.max_length),
        ends=end_tokens(tokens, trainee.tokenizer),
        max_new_tokens=settings.max_new_tokens,
        max_positions=trainee.source.max_positions,
        stop=settings.stop,
        title=f"answers {title}",
    )
    for row, text in answers.items():
        record = held_out.object(row)
        results[row].update(answer=str(record["answer"]), prediction=text, correct=is_correct(text, record))


def paired(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of ``predictions.jsonl``: both evaluations of each record side by side."""
    lines = []
    for old, new in zip(before, after, strict=True):
        line = {"id": new["id"], "num_tokens": new["num_tokens"], "nll_before": old["nll"], "nll": new["nll"]}
        if "answer" in new:
            line["answer"] = new["answer"]
        for name in ("prediction", "correct", "choice", "choice_correct"):
            if name in new:
                line[f"{name}_before"], line[name] = old[name], new[name]
        lines.append(line)
    return lines


def summarise(lines: Sequence[Mapping[str, Any]], settings: EvaluationSettings) -> dict[str, float]:
    """Flat ``eval/...`` metrics with 95 % bootstrap intervals over records.

    ``nll`` is nats per response token (all tokens together), ``nll_drop`` how much it fell; ``exact_match`` and
    ``option_accuracy`` are shares of the records that allow them.
    """
    metrics: dict[str, float] = {}

    def add(name: str, numerators: NDArray[np.float64], denominators: NDArray[np.float64], bounds: bool) -> None:
        total = denominators.sum()
        metrics[name] = float(numerators.sum() / total) if total else float("nan")
        if bounds and total:
            low, high = bootstrap_ratio(numerators, denominators, settings.bootstrap, settings.seed)
            metrics[f"{name}_low"], metrics[f"{name}_high"] = low, high

    def column(rows: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
        return np.array([float(row[name]) for row in rows])

    tokens = column(lines, "num_tokens")
    if tokens.sum():
        before, after = column(lines, "nll_before"), column(lines, "nll")
        add("eval/nll_before", before, tokens, bounds=False)
        add("eval/nll", after, tokens, bounds=True)
        add("eval/nll_drop", before - after, tokens, bounds=True)
    for field, metric in (("correct", "exact_match"), ("choice_correct", "option_accuracy")):
        judged = [line for line in lines if field in line]
        if judged:
            ones = np.ones(len(judged))
            add(f"eval/{metric}_before", column(judged, f"{field}_before"), ones, bounds=False)
            add(f"eval/{metric}", column(judged, field), ones, bounds=True)
    return metrics


def bootstrap_ratio(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], samples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of ``sum(numerators) / sum(denominators)`` over resampled records.

    Args:
        numerators: ``[records]``, e.g. summed losses or correct answers.
        denominators: ``[records]``, e.g. response tokens or ones; a record with 0 carries nothing and is left out.
        samples: Resamples.
        seed: Of the resampling.

    Returns:
        Lower and upper bound.
    """
    generator = np.random.default_rng(seed)
    numerators, denominators = numerators[denominators > 0], denominators[denominators > 0]
    records = len(numerators)
    values = np.empty(samples)
    for sample in range(samples):
        drawn = generator.integers(0, records, records)
        values[sample] = numerators[drawn].sum() / denominators[drawn].sum()
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
