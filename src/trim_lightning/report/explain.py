"""Why one record was picked, or why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from trim_lightning.errors import UserError
from trim_lightning.methods.base import load_selector
from trim_lightning.records.record import Turn
from trim_lightning.report.facts import Candidate, Occurrence, TargetView
from trim_lightning.report.selection_facts import occurrences_of
from trim_lightning.report.token_texts import texts_of
from trim_lightning.report.token_views import TargetTokenFile, match_view, named, read_banks
from trim_lightning.runs.names import BANKS, TARGETS
from trim_lightning.runs.reopened import OpenedRun
from trim_lightning.stages.task import MatchedTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRONGEST = 8
PART = "part/"  # begins the columns of what a score is a sum of
ALL = 1 << 30  # tokens: none is clipped


@dataclass(frozen=True)
class TokenLine:
    """One token of the record and what it was matched with."""

    text: str
    similarity: float
    direct: bool
    matched: str
    occurrence: Occurrence | None
    alignment: float | None = None


@dataclass(frozen=True)
class Explanation:
    """All that is said of one record.

    Attributes:
        title: What the record is called.
        verdict: Picked or not, and why, in sentences.
        candidate: The record; without tokens where the method matches none.
        scored: Records with a score.
        cut: Score of the last picked record.
        notes: What the reader should know.
        formula: How the score is made of its parts; empty where that is not a sum.
        strongest: The tokens with the highest similarity.
        weakest: Those with the lowest.
        teaching: Those with the highest alignment, where the method asks what a step for them would do.
        class_texts: Vocabulary id to text.
        occurrences: As in the report.
        targets: The target examples.
    """

    title: str
    verdict: list[str]
    candidate: Candidate
    scored: int
    cut: float | None
    notes: list[str]
    formula: str = ""
    strongest: Sequence[TokenLine] = ()
    weakest: Sequence[TokenLine] = ()
    teaching: Sequence[TokenLine] = ()
    class_texts: Mapping[int, str] = field(default_factory=dict)
    occurrences: Mapping[str, Occurrence] = field(default_factory=dict)
    targets: Sequence[TargetView] = ()


def explain_row(run: OpenedRun, row: int) -> Explanation:
    """Explain a record of the pool.

    Raises:
        UserError: if there is no such row, or what it needs is gone.
    """
    scores = run.scores
    if not 0 <= row < len(scores):
        raise UserError(f"--row={row}: the pool has rows 0 to {len(scores) - 1}")
    line = {name: scores[name][row].as_py() for name in scores.column_names}
    tokens, notes = None, []
    scored = line["score"] is not None
    if matches_tokens(run) and scored:
        tokens = run.matched_tokens(row)
        if tokens is None:
            from trim_lightning.report.rescore import rescore

            notes.append("the store holds the scoring pass no more: this record was scored again")
            if has_parts(run):
                notes.append("what its response tokens would teach is not computed again")
            group = run.group_of(row, list(read_banks(run.directory / BANKS)[0]))
            tokens = rescore(run, run.record(row).turns, group).tokens
    elif not matches_tokens(run):
        notes.append(f"method={run.settings.method['name']} ranks whole records: it has no scores of tokens")
    turns: list[tuple[str, str]] = []
    if tokens is None:
        turns = [(turn.role, turn.text) for turn in run.record(row).turns]
    candidate = Candidate(
        row=row,
        id=line["id"],
        rank=line["rank"],
        **{name: line[name] for name in ("score", "mean", "max", "coverage", "num_tokens", "selected")},
        turns=turns,
        parts={
            name.removeprefix(PART): line[name] for name in line if name.startswith(PART) and line[name] is not None
        },
    )
    return finish(run, f"row {row}, id {line['id']}", verdict_of_row(run, candidate), candidate, tokens, notes)


def explain_text(run: OpenedRun, turns: list[Turn]) -> Explanation:
    """Explain a text, whether the pool holds it or not.

    Raises:
        UserError: for a method that matches no tokens, or if what it needs is gone.
    """
    if not matches_tokens(run):
        raise UserError(f"--text: method={run.settings.method['name']} has no fingerprints to score a text against")
    if has_parts(run):
        raise UserError(
            f"--text: method={run.settings.method['name']} scores a record by its place among the others of the pool; "
            "give the --row or --id of one, or explain the text with a run of method=trim"
        )
    from trim_lightning.report.rescore import rescore

    found = rescore(run, turns)
    known = run.scores["score"].drop_null().to_numpy()
    rank = int((known >= np.float32(found.score)).sum()) + 1
    candidate = Candidate(
        row=-1, id="text", rank=rank, score=found.score, mean=found.mean, max=found.max, coverage=found.coverage,
        num_tokens=int(found.tokens.scope.sum()), selected=False,
    )  # fmt: skip
    cut = cut_of(run)
    verdict = [f"As one more record it would rank {rank:,} of {len(known) + 1:,} with a score of {found.score:.4f}."]
    if cut is not None:
        side = "above" if found.score > cut else "not above"
        verdict.append(f"The last picked record scores {cut:.4f}: this one lies {side} the cut.")
    return finish(run, "text", verdict, candidate, found.tokens, [])


def has_parts(run: OpenedRun) -> bool:
    """True for a run whose score is a sum of parts that are standardised over the pool."""
    return any(name.startswith(PART) for name in run.scores.column_names)


def matches_tokens(run: OpenedRun) -> bool:
    """True for a run that left fingerprints and the targets' saliency."""
    return all((run.directory / name).is_file() for name in (BANKS, TARGETS))


def cut_of(run: OpenedRun) -> float | None:
    """Score of the last picked record."""
    scored = pc.field("selected") & pc.is_valid(pc.field("score"))  # others of a cascade have a cheap score only
    picked = run.scores.filter(scored).sort_by("rank")
    return None if not len(picked) else float(picked["score"][-1].as_py())


def verdict_of_row(run: OpenedRun, candidate: Candidate) -> list[str]:
    """Picked or not, and why."""
    if candidate.score is None and candidate.rank is not None:
        return [
            f"{'Picked' if candidate.selected else 'Not picked'}: rank {candidate.rank:,}, behind all that were scored "
            "in full, for its cheap score was too low (scoring=cascade); scoring.cascade.keep=1 scores every record."
        ]
    if candidate.score is None or candidate.rank is None:
        return [f"Not picked: it has no score, for it {unscored_reason(run, candidate.row)}."]
    scores = run.scores
    scored = len(scores["score"].drop_null())
    picked = scores.filter(pc.field("selected"))
    lines = [f"{'Picked' if candidate.selected else 'Not picked'}: rank {candidate.rank:,} of {scored:,}."]
    cut, last = cut_of(run), pc.max(picked["rank"]).as_py()
    if cut is None:
        return [*lines, "No record was picked."]
    if candidate.selected:
        lines.append(f"It scores {candidate.score:.4f}; the last picked record (rank {last:,}) scores {cut:.4f}.")
    elif candidate.rank < last:
        lines.append(
            f"It ranks before the last picked record (rank {last:,}), so a filter left it out: a cap, a duplicate, "
            "a length bound or the token budget (the keys of selection)."
        )
    else:
        side = "below" if candidate.score <= cut else "above"
        lines.append(
            f"It scores {candidate.score:.4f}, {abs(cut - candidate.score):.4f} {side} the last picked record "
            f"(rank {last:,}, {cut:.4f})."
        )
        if candidate.score > cut:
            lines.append("Targets or groups took turns: a rank follows from whose turn it was, not from score alone.")
    return lines


def unscored_reason(run: OpenedRun, row: int) -> str:
    """Why a record has no score, as far as the run and its store know."""
    scoped, responses = run.scores["num_scored"][row].as_py(), run.response_tokens(row)
    method, required = run.settings.method, run.settings.selection.require_response
    if not scoped:
        return f"has no token in scope={run.settings.scope} or could not be rendered"
    if (required or load_selector(method).scores_responses()) and not responses:
        asks = "selection.require_response=true" if required else f"method={method['name']} scores responses"
        return f"{'may have' if responses is None else 'has'} no response token ({asks})"
    return f"is one that method={method['name']} leaves out"


def formula_of(run: OpenedRun, candidate: Candidate) -> str:
    """The score as a sum of its parts, where the pooler makes one."""
    if candidate.parts:
        weights = load_selector(run.settings.method)
        own = [
            f"{getattr(weights, f'{name}_weight'):g} × {name} {value:.4f}" for name, value in candidate.parts.items()
        ]
        return f"{candidate.score:.4f} = {' + '.join(own)}; each part is standardised over the records with a score"
    pooler = run.settings.pooler
    if pooler.name not in ("mean_max_coverage", "mean_max") or candidate.mean is None:
        return ""
    if len(read_banks(run.directory / BANKS)[0]) > 1:
        return ""
    parts = [(pooler.mean_weight, "mean", candidate.mean), (pooler.max_weight, "max", candidate.max)]
    if pooler.name == "mean_max_coverage":
        parts.append((pooler.coverage_weight, "coverage", candidate.coverage))
    terms = " + ".join(f"{weight:g} × {name} {value:.4f}" for weight, name, value in parts)
    weighed = {
        "idf": "; mean and max are of similarities that weigh by the idf of their class",
        "error": "; mean and max are of similarities that weigh by the model's error at the token",
    }.get(pooler.token_weight, "")
    return f"{candidate.score:.4f} = {terms}{weighed}"


def finish(
    run: OpenedRun, title: str, verdict: list[str], candidate: Candidate, tokens: MatchedTokens | None, notes: list[str]
) -> Explanation:
    """Add the tokens."""
    scored = len(run.scores["score"].drop_null())
    shared: dict[str, Any] = {"title": title, "verdict": verdict, "scored": scored, "cut": cut_of(run), "notes": notes}
    if tokens is None:
        return Explanation(**shared, candidate=candidate)
    if tokens.group:
        notes.append(f"its tokens are shown as target group {tokens.group!r} sees them, for which it scores best")
    kept = run.manifest.counts.get("max_length") or run.settings.max_length
    if len(tokens.token_ids) >= kept:
        notes.append(
            f"the record fills the {kept:,} tokens that are kept of one: what may follow was cut and never scored"
        )

    def tokenizer() -> PreTrainedTokenizerBase:
        from trim_lightning.models.load import load_tokenizer

        return load_tokenizer(run.source)

    texts = texts_of(run.source.tokenizer_directory, tokenizer)
    _, groups = read_banks(run.directory / BANKS)
    targets = TargetTokenFile(run.directory / TARGETS, groups, texts)
    matched = sorted({int(token) for token in np.unique(tokens.match[tokens.scope])})
    occurrences = occurrences_of(targets, [(tokens.group, token) for token in matched])
    pieces = texts.pieces(tokens.token_ids.tolist())
    order = [int(place) for place in np.argsort(-tokens.similarity, kind="stable") if tokens.scope[place]]

    def line(place: int) -> TokenLine:
        match = int(tokens.match[place])
        return TokenLine(
            text=pieces[place] or texts.name(int(tokens.token_ids[place])),
            similarity=float(tokens.similarity[place]),
            direct=bool(match == tokens.token_ids[place]),
            matched=texts.name(match),
            occurrence=occurrences.get(named(tokens.group, match)),
            alignment=None if tokens.alignment is None else float(tokens.alignment[place]),
        )

    strongest = order[:STRONGEST]
    aligned = tokens.alignment if tokens.alignment is not None else np.full(len(tokens.scope), np.nan)
    taught = sorted(
        np.flatnonzero(np.isfinite(aligned) & tokens.scope).tolist(), key=lambda place: -float(aligned[place])
    )
    return Explanation(
        **shared,
        candidate=Candidate(**{**vars(candidate), "view": match_view(tokens, texts, ALL)}),
        formula=formula_of(run, candidate),
        strongest=[line(place) for place in strongest],
        weakest=[line(place) for place in order[len(strongest) :][-STRONGEST // 2 :]],
        teaching=[line(place) for place in taught[:STRONGEST]],
        class_texts={token: texts.name(token) for token in matched},
        occurrences=occurrences,
        targets=[targets.view(place, ALL) for place in range(len(targets))],
    )
