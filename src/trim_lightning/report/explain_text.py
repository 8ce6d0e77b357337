"""An explanation in the terminal, and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from tabulate import tabulate

from trim_lightning.console.visible import visible
from trim_lightning.report.explain import Explanation, TokenLine
from trim_lightning.report.facts import MatchView
from trim_lightning.report.page import METHOD_NAMES, render, token_text
from trim_lightning.report.selection_page import (
    candidate_data,
    occurrence_data,
    saliency_top,
    saliency_words,
    target_data,
)
from trim_lightning.runs.reopened import OpenedRun

# backgrounds of the 256-colour palette, weak to strong, each with the foreground that can be read on it
DIRECT = ((23, 255), (29, 255), (36, 16), (43, 16), (50, 16))
FALLBACK = ((53, 255), (54, 255), (91, 255), (134, 16), (183, 16))
SHOWN_TEXT = 40


def terminal_text(found: Explanation, colour: bool) -> str:
    """The explanation for a terminal; without colours the tokens stand in the tables only."""
    candidate = found.candidate
    parts = [visible(found.title), "\n".join(map(visible, [*found.verdict, *found.notes]))]
    if found.formula:
        parts.append(f"score {found.formula}")
    if candidate.view is not None:
        parts.append(tinted(candidate.view) if colour else "".join(map(visible, candidate.view.texts)))
        if colour:
            legend = [paint(" direct ", DIRECT[-1]), paint(" fallback ", FALLBACK[-1], underline=True)]
            parts.append(f"{' '.join(legend)}  the brighter, the more similar; dim: not scored")
        parts.append("strongest tokens\n" + token_table(found.strongest))
        if found.weakest:
            parts.append("weakest tokens\n" + token_table(found.weakest))
        if found.teaching:
            parts.append(
                "tokens that teach most (how far a step for them would go for the targets)\n"
                + teaching_table(found.teaching)
            )
    elif candidate.turns:
        parts.append("\n\n".join(f"{role}: {visible(text)}" for role, text in candidate.turns))
    return "\n\n".join(parts)


def token_table(lines: Sequence[TokenLine]) -> str:
    """Tokens with their match and the target token behind it."""
    rows = []
    for line in lines:
        place = line.occurrence
        around = "" if place is None else token_text(f"{place.before[-14:]}[{place.text}]{place.after[:14]}")
        where = "" if place is None else f"{visible(place.target)}: {around}"
        rows.append(
            [
                token_text(line.text)[:SHOWN_TEXT],
                f"{line.similarity:.3f}",
                "direct" if line.direct else "fallback",
                token_text(line.matched)[:SHOWN_TEXT],
                where,
            ]
        )
    headers = ["token", "similarity", "match", "matched class", "where that weighs most in the targets"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "left", "left", "left"))


def teaching_table(lines: Sequence[TokenLine]) -> str:
    """Response tokens with their alignment."""
    rows = [[token_text(line.text)[:SHOWN_TEXT], f"{line.alignment:+.3g}", f"{line.similarity:.3f}"] for line in lines]
    headers = ["token", "alignment", "similarity"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right"))


def tinted(view: MatchView) -> str:
    """The record with a background for every scored token."""
    known = sorted(value for value in view.similarity if value is not None)
    low, high = (known[len(known) // 20], known[-1]) if known else (0.0, 1.0)
    out = []
    for text, similarity, direct in zip(view.texts, view.similarity, view.direct, strict=True):
        if not text:
            continue
        if similarity is None:
            out.append(f"\x1b[2m{visible(text)}\x1b[0m")
            continue
        share = (similarity - low) / (high - low) if high > low else 1.0
        shades = DIRECT if direct else FALLBACK
        shade = shades[min(len(shades) - 1, max(0, int(share * len(shades))))]
        # a line break inside a background would colour the rest of the line
        lines = [paint(visible(part), shade, underline=not direct) if part else "" for part in text.split("\n")]
        out.append("\n".join(lines))
    return "".join(out)


def paint(text: str, shade: tuple[int, int], underline: bool = False) -> str:
    """Text on a background."""
    background, ink = shade
    return f"\x1b[{'4;' if underline else ''}48;5;{background};38;5;{ink}m{text}\x1b[0m"


def explanation_page(found: Explanation, run: OpenedRun) -> str:
    """The explanation of a record of a run as a page."""
    method = run.settings.method["name"]
    values = {
        "found": found,
        "candidate": found.candidate,
        "method_name": METHOD_NAMES.get(method, method),
        "saliency_top": saliency_top(found.targets),
        "saliency_words": saliency_words(asdict(run.settings.saliency), run.attention),
    }
    data = {
        "top": saliency_top(found.targets),
        "targets": [target_data(target) for target in found.targets],
        "candidates": {"only": [candidate_data(found.candidate)]},
        "classes": {str(token): text for token, text in found.class_texts.items()},
        "occurrences": occurrence_data(found.occurrences),
    }
    return render("explain", values, data)
