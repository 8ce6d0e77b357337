"""Collect the facts of a finished selection."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.methods.base import Selector
from trim_lightning.privacy.paths import run_name, shareable_text
from trim_lightning.report.distributions import histogram, length_histogram, quantiles_of
from trim_lightning.report.facts import Candidate, FileLink, MatchView, Occurrence, Quantiles, SelectionFacts
from trim_lightning.report.mix import mixes_of, short_fields
from trim_lightning.report.token_texts import texts_of
from trim_lightning.report.token_views import TargetTokenFile, heaviest, match_view, named, read_banks
from trim_lightning.runs.names import BANKS, FILES, REPORT, TARGETS
from trim_lightning.selection.ranking import DEFAULT_FRACTION, ScoreTable
from trim_lightning.stages.task import SelectionTask

MOST_TOKENS = 700  # of a record that are shown token by token
SHOWN_TARGETS, SHOWN_CLASSES = 12, 30
LISTED_CHARACTERS = 16_000_000  # of the picked records in the page; a browser opens it in seconds
RECORD_CHARACTERS = 200  # of a picked record beside its text: numbers, names, punctuation


@dataclass(frozen=True)
class Outcome:
    """A selection before it is shown.

    Attributes:
        task: What was asked.
        selector: The method, after ``score``.
        scores: Scores of every pool record.
        order: Scored rows, best first.
        chosen: Selected rows, best first.
        manifest: Content of ``manifest.json``.
        directory: Where the files are.
    """

    task: SelectionTask
    selector: Selector
    scores: ScoreTable
    order: NDArray[np.int64]
    chosen: NDArray[np.int64]
    manifest: dict[str, Any]
    directory: Path


def gather(outcome: Outcome, examples: int, command: str | None = None) -> SelectionFacts:
    """All that the report shows.

    So many ``examples`` are shown token by token at the top, around the cut, and at the bottom.
    """
    scores, chosen = outcome.scores, outcome.chosen
    picked = np.zeros(len(scores), dtype=bool)
    picked[chosen] = True
    drawn = random_rows(outcome.order, len(chosen), outcome.task.settings.seed)
    lengths = {"pool": scores.num_tokens, "random": scores.num_tokens[drawn], "coreset": scores.num_tokens[chosen]}
    coverage = None if scores.coverage is None or np.isnan(scores.coverage).all() else scores.coverage
    mixes, counted = mixes_of(outcome.task.pool, outcome.task.targets, chosen.tolist())
    fields = {mix.field for mix in mixes}
    places = candidate_places(scored_in_full(outcome), picked, examples)
    tokens, views = token_facts(outcome, [row for rows in places.values() for row in rows])
    top, borderline, bottom = (
        [replace(item, view=views.get(item.row)) for item in candidates(outcome, rows, fields)]
        for rows in places.values()
    )
    return SelectionFacts(
        title=run_name(outcome.directory),
        manifest=outcome.manifest,
        budget=budget_text(outcome),
        cut=number(scores.score, int(chosen[-1])) if len(chosen) else None,
        scores=histogram({"left": scores.score[~picked], "picked": scores.score[picked]}),
        lengths=length_histogram(lengths),
        length_quantiles=quantiles(scores.num_tokens, drawn, chosen),
        score_quantiles=quantiles(scores.score, drawn, chosen),
        coverage_quantiles=[] if coverage is None else quantiles(coverage, drawn, chosen),
        mixes=mixes,
        mix_sample=counted,
        **tokens,
        num_targets=0 if outcome.task.targets is None else len(outcome.task.targets.records),
        top=top,
        borderline=borderline,
        bottom=bottom,
        coreset=listed(candidates(outcome, chosen.tolist(), fields)),
        command=None if command is None else shareable_text(command),
        files=files_of(outcome.directory),
    )


def scored_in_full(outcome: Outcome) -> NDArray[np.int64]:
    """Rows with a score, best first; others of a cascade have no tokens to show."""
    score, order = outcome.scores.score, outcome.order
    unscored = np.isnan(score)
    return order[~unscored[order]] if unscored.any() else order


def listed(picked: Iterable[Candidate]) -> list[Candidate]:
    """The picked records, best first, as far as a page can hold them."""
    found: list[Candidate] = []
    room = LISTED_CHARACTERS
    for item in picked:
        room -= RECORD_CHARACTERS + sum(len(text) for _, text in item.turns)
        if room < 0 and found:
            break
        found.append(item)
    return found


def random_rows(order: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """A random coreset of the same size, to compare with."""
    places = np.random.default_rng(seed).choice(len(order), size=size, replace=False) if size else order[:0]
    return np.sort(order)[places]


def quantiles(values: NDArray[Any], drawn: NDArray[np.int64], chosen: NDArray[np.int64]) -> list[Quantiles]:
    """Quantiles over pool, random coreset and coreset."""
    parts = {"pool": values, "random": values[drawn], "coreset": values[chosen]}
    return [quantiles_of(name, part) for name, part in parts.items()]


def candidate_places(order: NDArray[np.int64], picked: NDArray[np.bool_], examples: int) -> dict[str, list[int]]:
    """Rows at the top, around the cut (half of them inside), and at the bottom, each row once."""
    inside, outside = order[picked[order]], order[~picked[order]]
    half = max(1, examples // 2)
    top: list[int] = inside[:examples].tolist()
    edge = [*inside[len(top) :][-half:].tolist(), *outside[: examples - half].tolist()] if len(outside) else []
    taken = {*top, *edge}
    bottom = [row for row in order[-examples:].tolist() if row not in taken]
    return {"top": top, "borderline": edge, "bottom": bottom}


def candidates(outcome: Outcome, rows: Iterable[int], fields: Collection[str]) -> Iterator[Candidate]:
    """Read some records, each with its text, its place in the ranking and the fields that the page counts by."""
    pool, scores = outcome.task.pool, outcome.scores
    ranks, picked = (
        np.zeros(len(scores), dtype=np.int32),
        np.zeros(len(scores), dtype=bool),
    )  # 4 bytes a record: millions
    ranks[outcome.order], picked[outcome.chosen] = np.arange(1, len(outcome.order) + 1, dtype=np.int32), True
    for row in rows:
        record = pool.record(row)
        parts: Any = {name: number(getattr(scores, name), row) for name in ("score", "mean", "max", "coverage")}
        yield Candidate(
            row=row,
            id=record.id,
            rank=int(ranks[row]) or None,
            **parts,
            num_tokens=int(scores.num_tokens[row]),
            selected=bool(picked[row]),
            turns=[(turn.role, turn.text) for turn in record.turns],
            parts={name: number(values, row) for name, values in scores.parts.items()},
            fields={name: text for name, text in short_fields(pool.object(row)) if name in fields},
        )


def number(values: NDArray[np.float32] | None, row: int) -> float | None:
    """A finite value, or None."""
    return None if values is None or not np.isfinite(values[row]) else round(float(values[row]), 6)


def token_facts(outcome: Outcome, rows: Sequence[int]) -> tuple[dict[str, Any], dict[int, MatchView]]:
    """Targets, fingerprints and candidates by token; empty for methods that match none.

    Returns:
        The fields of `SelectionFacts` that are about tokens, and row to record.
    """
    directory = outcome.directory
    if not all((directory / name).exists() for name in (BANKS, TARGETS)):
        return {}, {}
    scorer = outcome.task.scorer
    texts = texts_of(scorer.source.tokenizer_directory, lambda: scorer.tokenizer)
    banks, groups = read_banks(directory / BANKS)
    targets = TargetTokenFile(directory / TARGETS, groups, texts)
    matched = outcome.selector.matched_tokens(outcome.task, rows)
    classes = heaviest(banks, texts, max(5, SHOWN_CLASSES // len(banks)))
    wanted = {(item.group, item.token_id) for item in classes}
    for tokens in matched.values():
        shown = tokens.match[:MOST_TOKENS][tokens.scope[:MOST_TOKENS]]
        wanted |= {(tokens.group, int(token)) for token in np.unique(shown)}
    found = {
        "classes": classes,
        "num_classes": sum(len(bank.token_ids) for bank in banks.values()),
        "occurrences": occurrences_of(targets, wanted),
        "class_texts": {token: texts.name(token) for _, token in sorted(wanted)},
        "targets": [targets.view(place, MOST_TOKENS) for place in range(min(len(targets), SHOWN_TARGETS))],
    }
    return found, {row: match_view(tokens, texts, MOST_TOKENS) for row, tokens in matched.items()}


def occurrences_of(targets: TargetTokenFile, wanted: Iterable[tuple[str, int]]) -> dict[str, Occurrence]:
    """Group and class to the class's heaviest target token."""
    found = {named(group, token): targets.occurrence(token, group) for group, token in sorted(wanted)}
    return {name: place for name, place in found.items() if place is not None}


def budget_text(outcome: Outcome) -> str:
    """The budget in words."""
    if outcome.selector.takes_all:
        return "whole pool"
    selection = outcome.task.settings.selection
    if selection.count is not None:
        return f"{selection.count:,} records"
    if selection.tokens is not None:
        kind = "response" if selection.token_scope == "response" else "content"
        return f"{selection.tokens:,} {kind} tokens"
    return f"{100 * (DEFAULT_FRACTION if selection.fraction is None else selection.fraction):g} % of the pool"


def files_of(directory: Path) -> list[FileLink]:
    """The files that are there, the page itself left out."""
    meanings = {**FILES, "metrics.csv": "the counts and the stages' numbers"}
    present = [name for name in meanings if name != REPORT and (directory / name).is_file()]
    return [FileLink(name, meanings[name], (directory / name).stat().st_size) for name in present]
