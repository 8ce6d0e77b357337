"""Evaluate one model on the held-out records: every number per record, through the store."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.files.atomic import write_text
from trim_lightning.records.record_file import RecordFile
from trim_lightning.selection.responses import missing_responses
from trim_lightning.settings.schema import EvaluationSettings
from trim_lightning.stages.trainee import Evaluated, Trainee
from trim_lightning.store import Entry, StageKey
from trim_lightning.tokens.tokenized import TokenizedRecords

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trim_lightning.engine.devices import Resources
    from trim_lightning.models.load import ModelRecipe

RESULTS, PASSES = "held_out.json", "passes"


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
    wanted, tokens, tokens_entry = measurable(trainee, held_out, settings)
    choices = {name: value for name, value in asdict(settings).items() if name in ("max_new_tokens", "stop")}
    resources = trainee.resources()
    key = StageKey(
        "evaluate",
        3,
        {**wanted, **(choices if wanted["exact_match"] else {}), "tokens_per_batch": resources.tokens_per_batch},
        {
            "held_out": tokens_entry.key.hex,
            "trainee": trainee.identity,
            "tuned": None if tuned is None else tuned.key.hex,
        },
    )

    def build(directory: Path) -> dict[str, Any]:
        from trim_lightning.engine.devices import model_for

        # the passes' own files are kept until all of them are done
        measuring = Measuring(trainee, held_out, tokens, directory / PASSES, resources, title)
        model = model_for(resources, Evaluated(trainee, tuned))
        seconds = measuring.run_losses(model)
        if wanted["option_accuracy"]:
            seconds += measuring.run_options(model)
        if wanted["exact_match"]:
            seconds += measuring.run_answers(model, settings)
        if resources.processes.leads:
            write_text(json.dumps(measuring.results()), directory / RESULTS)
            shutil.rmtree(directory / PASSES)
        return {"seconds": seconds, "tokens": tokens.total_tokens}

    more: dict[str, Any] = {}
    if wanted["option_accuracy"]:
        more["how_many"] = lambda: 1 + mean_options(held_out)
    if wanted["exact_match"]:
        more.update(how_many_answers=lambda: len(answered(held_out)), answer_tokens=settings.max_new_tokens)
        more["assumed"] = f"answers of {settings.max_new_tokens} tokens"
    cost = trainee.cost(f"evaluate_{title}", "evaluation", tokens, resources=resources, loads=True, **more)
    entry = trainee.store.get(key, build, resumable=True, together=True, cost=cost)
    trainee.ledger.book(f"evaluate_{title}", entry)
    results: list[dict[str, Any]] = json.loads((entry.path / RESULTS).read_text(encoding="utf-8"))
    return results


def measurable(
    trainee: Trainee, held_out: RecordFile, settings: EvaluationSettings
) -> tuple[dict[str, bool], TokenizedRecords, Entry]:
    """Look at held-out records without a model: a training of hours should not end in a refusal.

    Returns:
        Which measures apply, and the tokens with their stored entry.

    Raises:
        UserError: if a measure is asked for that no record allows, or there is nothing to measure.
    """
    wanted = measures(held_out, settings)
    tokens, entry = trainee.tokenize(held_out, "tokenize")
    if not any(wanted.values()) and not (tokens.content_lengths("response") > 0).any():
        missing = missing_responses(held_out, tokens, trainee.max_length)
        raise UserError(
            f"{held_out.place(0)}: no held-out record has a response to measure ({missing}); give others"
            f"{missing.or_longer}"
        )
    return wanted, tokens, entry


def answered(held_out: RecordFile) -> list[int]:
    """Rows of the records that have an ``answer``."""
    return [row for row in range(len(held_out)) if held_out.object(row).get("answer") is not None]


def has_options(record: Mapping[str, Any]) -> bool:
    """True if a record has choices and says which is right."""
    from trim_lightning.evaluation.options import correct_option

    if record.get("answer") is None or not isinstance(record.get("choices"), list):
        return False
    return correct_option(record) is not None


def mean_options(held_out: RecordFile) -> float:
    """Mean number of ``choices`` of the held-out records; a record without usable ones has none."""
    choices = (held_out.object(row).get("choices") for row in range(len(held_out)))
    return sum(len(found) for found in choices if isinstance(found, list)) / len(held_out)


def measures(held_out: RecordFile, settings: EvaluationSettings) -> dict[str, bool]:
    """Which measures apply: options where records have ``choices``, exact match where they have ``answer`` alone.

    Raises:
        UserError: if ``always`` is asked and the first record lacks the field.
    """
    first = held_out.object(0)
    has_answer, chooses = first.get("answer") is not None, has_options(first)
    for name, wanted, possible, field in (
        ("exact_match", settings.exact_match, has_answer, "answer"),
        ("option_accuracy", settings.option_accuracy, chooses, "choices with its answer among them"),
    ):
        if wanted == "always" and not possible:
            raise UserError(f"evaluation.{name}=always: {held_out.place(0)} has no {field}; use auto")
    return {
        "exact_match": settings.exact_match == "always"
        or (settings.exact_match == "auto" and has_answer and not chooses),
        "option_accuracy": settings.option_accuracy != "never" and chooses,
    }


class Measuring:
    """The passes of one evaluation, in which all processes take part, and what the first one makes of them.

    Args:
        trainee: Gives tokenizer and limits.
        held_out: The records.
        tokens: Those, tokenised.
        directory: Where the passes' own files are, on all processes; what an earlier attempt left there is kept.
        resources: What they run on.
        title: ``before`` or ``after``.
    """

    def __init__(
        self,
        trainee: Trainee,
        held_out: RecordFile,
        tokens: TokenizedRecords,
        directory: Path,
        resources: Resources,
        title: str,
    ) -> None:
        self.trainee, self.held_out, self.tokens = trainee, held_out, tokens
        self.directory, self.resources, self.title = directory, resources, title
        self._readers: list[Callable[[list[dict[str, Any]]], None]] = []
        directory.mkdir(exist_ok=True)

    def results(self) -> list[dict[str, Any]]:
        """A line for each record, from what all passes found."""
        lines: list[dict[str, Any]] = [{"id": self.held_out.id(row)} for row in range(len(self.held_out))]
        for read in self._readers:
            read(lines)
        return lines

    def run_losses(self, model: PreTrainedModel | ModelRecipe) -> float:
        """Summed response loss (``nll``) and response tokens (``num_tokens``) of each record."""
        from trim_lightning.engine.response_loss import read_losses, response_counts, run_loss_pass

        folder = self.directory / "losses"

        def read(lines: list[dict[str, Any]]) -> None:
            counts, losses = response_counts(self.tokens), read_losses(folder, self.tokens)
            for row, line in enumerate(lines):
                line.update(num_tokens=int(counts[row]), nll=float(losses[row]))

        self._readers.append(read)
        return run_loss_pass(model, self.tokens, folder, resources=self.resources, title=f"loss {self.title}")

    def run_options(self, model: PreTrainedModel | ModelRecipe) -> float:
        """``choice`` and ``choice_correct``: a record of its own for every option."""
        from trim_lightning.engine.response_loss import read_losses, response_counts, run_loss_pass
        from trim_lightning.evaluation.options import LastResponses, correct_option, likeliest

        lines, name = self.resources.processes.agree("options", self._write_options)
        if not lines:
            return 0.0
        folder, tokens = self.directory / "options", LastResponses(self.directory / name)

        def read(results: list[dict[str, Any]]) -> None:
            whole = tokens.lengths < self.trainee.max_length  # a response that was cut cannot be compared
            counts = np.where(whole, response_counts(tokens), 0)
            for row, option in likeliest(lines, read_losses(folder, tokens), counts).items():
                results[row]["choice"] = option
                results[row]["choice_correct"] = option == correct_option(self.held_out.object(row))

        self._readers.append(read)
        return run_loss_pass(model, tokens, folder, resources=self.resources, title=f"options {self.title}")

    def _write_options(self) -> tuple[list[tuple[int, int]], str]:
        """Every option of every record, tokenised in a folder of its own: ``(row, option)`` of each, its name."""
        from trim_lightning.evaluation.options import write_option_records
        from trim_lightning.records.indexing import index
        from trim_lightning.records.record_file import LineSource, ReadOptions
        from trim_lightning.tokens.tokenized import tokenize_records

        folder = Path(tempfile.mkdtemp(prefix="option-tokens-", dir=self.directory))
        file = folder / "options.jsonl"
        lines = write_option_records(self.held_out, file)
        if lines:
            options = index(LineSource(file, label="options", name="options", what="evaluation"), ReadOptions())
            tokenize_records(options, self.trainee.renderer, self.trainee.max_length, folder, "options")
        return lines, folder.name

    def run_answers(self, model: PreTrainedModel | ModelRecipe, settings: EvaluationSettings) -> float:
        """``answer``, ``prediction`` and ``correct`` of the records that have an answer."""
        from trim_lightning.evaluation.answers import is_correct
        from trim_lightning.evaluation.generation import (
            AnswerLimits,
            answer_prompts,
            end_tokens,
            read_answers,
            run_answer_pass,
        )

        trainee, folder, rows = self.trainee, self.directory / "answers", answered(self.held_out)
        prompts = answer_prompts(self.held_out, self.tokens, rows, trainee.renderer, trainee.max_length)
        ends = end_tokens(self.tokens, trainee.tokenizer)
        limits = AnswerLimits(ends, settings.max_new_tokens, trainee.source.max_positions, settings.stop)

        def read(lines: list[dict[str, Any]]) -> None:
            for row, text in read_answers(folder, prompts, limits, trainee.tokenizer).items():
                record = self.held_out.object(row)
                lines[row].update(answer=str(record["answer"]), prediction=text, correct=is_correct(text, record))

        self._readers.append(read)
        title = f"answers {self.title}"
        return run_answer_pass(model, prompts, limits, folder, resources=self.resources, title=title)


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
