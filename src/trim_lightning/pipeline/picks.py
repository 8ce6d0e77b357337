"""The first picked records in a line each: what a user sees of a selection before all tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trim_lightning.console.terminal import WIDTH, cut
from trim_lightning.console.visible import visible
from trim_lightning.records.kinds import count_kinds, kind_field
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.targets import TargetSet

SHOWN = 8  # records
KIND_WIDTH = 24  # columns, at most
WANTED, OTHER, FAINT, PLAIN = "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Pick:
    """A picked record.

    Attributes:
        score: Its score.
        kind: What kind it is of; empty if records do not say.
        wanted: The targets are of that kind too.
        text: What the user says in it first.
    """

    score: float
    kind: str
    wanted: bool
    text: str


def first_picks(
    pool: RecordFile, targets: TargetSet | None, score: NDArray[np.float32], chosen: NDArray[np.int64]
) -> list[Pick]:
    """The best of the selected records, at most `SHOWN`."""
    rows = chosen[:SHOWN].tolist()
    field = kind_field(pool.object(rows[0])) if rows else None
    wanted: set[str] = set()
    if field is not None and targets is not None:
        wanted = {*count_kinds(map(targets.records.object, range(len(targets.records))), field)}
    picks = []
    for row in rows:
        kind = next(iter(count_kinds([pool.object(row)], field)), "") if field is not None else ""
        said = next((turn.content for turn in pool.record(row).turns if turn.role == "user"), "")
        picks.append(Pick(float(score[row]), kind, kind in wanted, said))
    return picks


def picks_text(picks: Sequence[Pick], selected: int, colour: bool) -> str:
    """A line for each pick; with ``colour`` the targets' own kind is green, any other yellow.

    ``selected`` is the number of all selected records.
    """
    lines = ["picked, best first"]
    kinds = [cut(visible(pick.kind), KIND_WIDTH) for pick in picks]
    width = max(map(len, kinds), default=0)
    for rank, (pick, kind) in enumerate(zip(picks, kinds, strict=True), start=1):
        start, middle = f"{rank:>3}  {pick.score:.4f}  ", f"{kind:<{width}}" + "  " * bool(width)
        text = cut(visible(pick.text[: 4 * WIDTH]), WIDTH - len(start) - len(middle))
        if colour:
            tint = (WANTED if pick.wanted else OTHER) if pick.kind else ""
            start, middle = f"{FAINT}{start}{PLAIN}", f"{tint}{middle}{PLAIN}"
        lines.append(start + middle + text)
    if selected > len(picks):
        lines.append(f"and {selected - len(picks):,} more")
    return "\n".join(lines)
