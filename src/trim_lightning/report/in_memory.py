"""The report of a selection among records that a program holds, shown in a notebook or saved as a page."""

from __future__ import annotations

import html
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trim_lightning.files.atomic import write_text
from trim_lightning.records.indexing import MARKS
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.sources import open_records
from trim_lightning.records.targets import TargetSet
from trim_lightning.report.selection_facts import Outcome, gather
from trim_lightning.report.selection_page import selection_page
from trim_lightning.runs.names import BANKS, TARGETS
from trim_lightning.selection.ranking import ScoreTable, rank_by_score
from trim_lightning.settings.schema import PoolSettings, SelectionSettings, SelectSettings
from trim_lightning.stages.fingerprints import SalientTarget, save_banks
from trim_lightning.stages.task import MatchedTokens
from trim_lightning.stages.token_files import name_targets, write_target_tokens
from trim_lightning.store import Store
from trim_lightning.store.versions import versions
from trim_lightning.trim.fingerprints import FingerprintBank


@dataclass(frozen=True)
class Report:
    """``report.html`` of a selection; a notebook shows it as it is.

    Attributes:
        html: The page: one file that opens without a network.
        title: What it shows, in a line.
    """

    html: str = field(repr=False)
    title: str

    def save(self, path: str | Path) -> Path:
        """Write the page, and give its path back."""
        write_text(self.html, Path(path))
        return Path(path)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, which can do nothing to the notebook around it."""
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" title="{html.escape(self.title)}" '
            'style="width: 100%; height: 800px; border: 1px solid #8888"></iframe>'
        )


@dataclass(frozen=True)
class Shown:
    """What the report is made from.

    Attributes:
        pool: The records, as JSON has them; the targets likewise.
        targets: See pool.
        salient: The targets' tokens with their saliency.
        bank: Their fingerprints.
        scores: Of every record of the pool.
        chosen: Picked rows, best first.
        budget: The keys of ``selection`` that chose them.
        matched: Rows to their tokens, for the records that are shown token by token.
        tokenizer: Writes tokens as text.
        model: Name and checksum of the scorer.
        settings: The settings groups that were used, by their names.
        stages: Name to seconds and to tokens through the model.
    """

    pool: Sequence[Mapping[str, Any]]
    targets: Sequence[Mapping[str, Any]]
    salient: list[SalientTarget]
    bank: FingerprintBank
    scores: ScoreTable
    chosen: NDArray[np.int64]
    budget: Mapping[str, Any]
    matched: Callable[[Sequence[int]], dict[int, MatchedTokens]]
    tokenizer: Any
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    stages: Mapping[str, tuple[float, int]]


@dataclass(frozen=True)
class _Matched:
    """Stands for the selector: its tokens are asked of the program's own scorer."""

    tokens: Callable[[Sequence[int]], dict[int, MatchedTokens]]
    takes_all: ClassVar[bool] = False

    def matched_tokens(self, task: Any, rows: Sequence[int]) -> dict[int, MatchedTokens]:
        return self.tokens(rows)


def report_of(shown: Shown, examples: int) -> Report:
    """The page that `trim-select` writes, of records in memory.

    The page's own parts read files, so records, bank and target tokens go through a folder that is gone afterwards.

    Raises:
        UserError: if a record cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="trim-report-") as name:
        folder = Path(name)
        pool, targets = (_spooled(folder, what, records) for what, records in
                         (("pool", shown.pool), ("target", shown.targets)))  # fmt: skip
        save_banks({"": shown.bank}, folder / BANKS, {"groups": {"": list(range(len(targets)))}})
        write_target_tokens(shown.salient, folder / "rows.parquet")
        name_targets(folder / "rows.parquet", targets, folder / TARGETS)
        task: Any = SimpleNamespace(  # what the page asks of a selection's task
            pool=pool,
            targets=TargetSet(targets, {"": list(range(len(targets)))}, targets),
            settings=SelectSettings(selection=SelectionSettings(**shown.budget)),
            scorer=SimpleNamespace(
                source=SimpleNamespace(tokenizer_directory=folder / "none"), tokenizer=shown.tokenizer
            ),
        )
        selector: Any = _Matched(shown.matched)
        order = rank_by_score(shown.scores.score)
        outcome = Outcome(task, selector, shown.scores, order, shown.chosen, _manifest(shown, pool, targets), folder)
        facts = replace(gather(outcome, examples), title="from Python", files=[])
    title = f"{len(shown.chosen):,} of {len(shown.pool):,} records, picked by TRIM"
    return Report(selection_page(facts), title)


def _spooled(folder: Path, what: str, records: Sequence[Mapping[str, Any]]) -> RecordFile:
    path = folder / f"{what}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    # a record that a preference set marks as bad was scored like any other, and keeps its row
    marked = {name: list[Any]() for name in MARKS if any(name in record for record in records)}
    source = PoolSettings(source="jsonl", path=str(path), exclude=marked)
    file = open_records(source, what=what, seed=0, spool=Store(folder / "store").spool)
    assert len(file) == len(records)
    return file


def _manifest(shown: Shown, pool: RecordFile, targets: RecordFile) -> dict[str, Any]:
    """What the page shows of a manifest, as far as it is known of records in memory."""
    scores, chosen = shown.scores, shown.chosen
    inputs = {"pool": pool, "target": targets}
    return {
        "config": {
            "method": {"name": "trim"},
            "selection": dict(shown.budget),
            **{
                name: value if isinstance(value, str | int) else asdict(value) for name, value in shown.settings.items()
            },
        },
        "inputs": {
            **{
                what: {"name": what, "sha256": records.sha256, "rows": len(records), "source_rows": len(records)}
                for what, records in inputs.items()
            },
            "model": dict(shown.model),
        },
        "counts": {
            "pool": len(pool),
            "unscored": int(np.isnan(scores.score).sum()),
            "selected": len(chosen),
            "selected_tokens": int(scores.num_tokens[chosen].sum()),
            "fallback_share": None,
            "max_length": shown.settings["max_length"],
        },
        "stages": {
            name: {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds, "cached": False}
            for name, (seconds, tokens) in shown.stages.items()
        },
        "warnings": [],
        "git": None,
        "versions": versions(),
    }
