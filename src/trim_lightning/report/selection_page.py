"""``report.html``: one selection."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trim_lightning.files.atomic import write_text
from trim_lightning.report.facts import Candidate, MatchView, Occurrence, Quantiles, SelectionFacts, TargetView
from trim_lightning.report.page import METHOD_NAMES, pretty, render
from trim_lightning.report.selection_facts import Outcome, gather
from trim_lightning.runs.names import REPORT
from trim_lightning.runs.selection import MODEL_STAGES


def selection_page(facts: SelectionFacts) -> str:
    """The whole page as text."""
    manifest = facts.manifest
    stages = manifest["stages"]
    method = manifest["config"]["method"]["name"]
    tokens = sum(stages[name]["tokens"] for name in MODEL_STAGES if name in stages)
    values = {
        "facts": facts,
        "manifest": manifest,
        "counts": manifest["counts"],
        "inputs": manifest["inputs"],
        "target": manifest["inputs"].get("target"),
        "parts": {
            name: manifest["config"]["method"].get(f"{name}_weight", 1.0)
            for item in facts.top[:1]
            for name in item.parts
        },
        "teaches": any(
            value is not None for item in facts.top if item.view is not None for value in item.view.alignment
        ),
        "method_name": METHOD_NAMES.get(method, method),
        "scored_by_model": bool(tokens),
        "warmed_up": "warmup" in stages,
        "saliency_words": saliency_words(
            manifest["config"].get("saliency", {}), stages.get("fingerprint", {}).get("attention")
        ),
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "some_cached": any(stage["cached"] for stage in stages.values()),
        "model_tokens": tokens,
        "words": {"scores": score_words(facts), "lengths": length_words(facts.length_quantiles)},
        "grouped": any(item.group for item in facts.classes),
        "heaviest_mass": max((item.mass for item in facts.classes), default=1.0) or 1.0,
        "saliency_top": saliency_top(facts.targets),
        "config": pretty(manifest["config"]),
        "versions": pretty({"git": manifest["git"], **manifest["versions"]}),
    }
    return render("report", values, page_data(facts))


def score_words(facts: SelectionFacts) -> str:
    """What the score chart shows, for those who do not see it."""
    by_name = {spread.name: spread for spread in facts.score_quantiles}
    if facts.cut is None or by_name["coreset"].mean is None or by_name["pool"].mean is None:
        return "No record was picked."
    return (
        f"The last picked record scores {facts.cut:.4f}. Mean score: {by_name['coreset'].mean:.4f} in the coreset, "
        f"{by_name['pool'].mean:.4f} in the pool."
    )


def length_words(spreads: Sequence[Quantiles]) -> str:
    """What the length chart shows."""
    parts = [
        f"{spread.mean:,.0f} in {'a' if spread.name == 'random' else 'the'} "
        f"{'random coreset of the same size' if spread.name == 'random' else spread.name}"
        for spread in sorted(spreads, key=lambda spread: ("coreset", "random", "pool").index(spread.name))
        if spread.mean is not None
    ]
    return f"Mean content tokens of a record: {', '.join(parts)}." if parts else "No record was picked."


def saliency_words(weights: Mapping[str, Any], attention: Mapping[str, Any] | None) -> list[str]:
    """What the tint of the targets is made of.

    Args:
        weights: ``saliency`` of the config; may be empty.
        attention: Which layers' attention was read, of a model in which not all have some.
    """
    reads = bool(weights.get("row_weight", 1) or weights.get("column_weight", 1))
    words = []
    if reads:
        words.append(
            "Row: how focused the token's own attention is. Column: how much attention it gets. Combined: what counts."
        )
        if attention is not None and attention["layers"]:
            name = "layer" if len(attention["layers"]) == 1 else "layers"
            told = ", ".join(map(str, attention["layers"]))
            words.append(
                f"Saliency is from the softmax attention of {name} {told}, counted from 0, of {attention['of']}."
            )
    if weights.get("error_weight"):
        beside = "counts beside them" if reads else "counts alone: row and column, where they are shown, do not"
        words.append(
            f"The model's error {beside}, with weight {weights['error_weight']:g}: one minus the probability that it "
            "gave the token after all before it."
        )
    elif not reads:
        words.append("Every scoped token weighs the same: row and column, where they are shown, do not count.")
    return words


def saliency_top(targets: Sequence[TargetView]) -> float:
    """The largest value of any signal: what the strongest tint stands for."""
    signals = (values for target in targets for values in (target.row, target.column, target.saliency))
    return max((value for values in signals for value in values if value is not None), default=1.0) or 1.0


def page_data(facts: SelectionFacts) -> dict[str, Any]:
    """What the script draws. Names are short where they are repeated for every record or token."""
    return {
        "cut": facts.cut,
        "kept": facts.manifest["counts"].get("max_length"),
        "scores": None if facts.scores is None else asdict(facts.scores),
        "lengths": None if facts.lengths is None else asdict(facts.lengths),
        "top": saliency_top(facts.targets),
        "targets": [target_data(target) for target in facts.targets],
        "candidates": {
            name: [candidate_data(item) for item in getattr(facts, name)] for name in ("top", "borderline", "bottom")
        },
        "classes": {str(token): text for token, text in facts.class_texts.items()},
        "occurrences": occurrence_data(facts.occurrences),
        "coreset": [candidate_data(item, turns=True) for item in facts.coreset],
    }


def occurrence_data(occurrences: Mapping[str, Occurrence]) -> dict[str, Any]:
    """The heaviest target token of each class."""
    return {name: asdict(place) for name, place in occurrences.items()}


def target_data(target: TargetView) -> dict[str, Any]:
    """A target example."""
    return {
        "id": target.id,
        "t": target.texts,
        "r": target.row,
        "c": target.column,
        "s": target.saliency,
        "clipped": target.clipped,
    }


def candidate_data(item: Candidate, turns: bool = False) -> dict[str, Any]:
    """A pool record; its text only where there is no token view that shows it, or ``turns`` asks for it."""
    return {
        "row": item.row,
        "id": item.id,
        "rank": item.rank,
        "score": item.score,
        "mean": item.mean,
        "max": item.max,
        "cov": item.coverage,
        "n": item.num_tokens,
        "in": item.selected,
        "f": item.fields,
        **({"parts": item.parts} if item.parts else {}),
        **({"turns": item.turns} if turns or item.view is None else {}),
        **({} if item.view is None else {"view": view_data(item.view)}),
    }


def view_data(view: MatchView) -> dict[str, Any]:
    """Tokens of a candidate."""
    direct = [None if value is None else int(value) for value in view.direct]
    return {
        "t": view.texts,
        "s": view.similarity,
        "m": view.match,
        "d": direct,
        "group": view.group,
        "clipped": view.clipped,
        **({"a": view.alignment} if view.alignment else {}),
    }


log = logging.getLogger(__name__)


def write_report(outcome: Outcome, examples: int, command: str | None = None) -> SelectionFacts | None:
    """Write ``report.html``; see `gather`.

    A fault in here is told and does no harm: the selection is finished, and the other jobs of a sweep go on.

    Returns:
        What the page shows, None if it could not be made.

    Raises:
        OSError: if the file cannot be written.
    """
    try:
        facts = gather(outcome, examples, command)
        page = selection_page(facts)
    except OSError:
        raise
    except Exception:
        log.exception("%s could not be made; all other files are there", REPORT)
        return None
    write_text(page, outcome.directory / REPORT)
    return facts
