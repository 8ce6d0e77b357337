"""``trim-compare``: a table over runs, tests between groups of them, overlaps, and what a sweep shows."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_lightning.cli.exits import Parser, command
from trim_lightning.console.amounts import place_text
from trim_lightning.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trim_lightning.compare.diversity import Embed

SAMPLES = 10_000
CHUNK = 256  # records embedded between two steps of the progress bar


@command
def main(arguments: Sequence[str]) -> None:
    """Parse, compare, print and write.

    Raises:
        UserError: for a wrong command line, a path without runs, or an output folder that cannot be written.
    """
    options = parser().parse_args(list(arguments))
    if options.bootstrap < 100:
        raise UserError(f"--bootstrap={options.bootstrap}: at least 100 resamples are needed for an interval")
    if options.seed < 0:
        raise UserError(f"--seed={options.seed}: must be at least 0")
    from trim_lightning.compare.files import TESTED, difference_rows, run_rows, write_rows
    from trim_lightning.compare.report import compare
    from trim_lightning.compare.tables import report_text
    from trim_lightning.console.visible import visible
    from trim_lightning.report.comparison_page import write_comparison
    from trim_lightning.runs.find import find_runs

    find_runs(options.runs)  # a wrong path is told before a model is loaded
    report = compare(
        options.runs,
        all_pairs=options.all_pairs,
        samples=options.bootstrap,
        seed=options.seed,
        embed=embedder(options.embed),
    )
    print(visible(report_text(report)), flush=True)
    folder = options.output or report.sweep or Path.cwd()
    written = write_rows(run_rows(report), folder / "compare")
    if report.comparisons:
        written += write_rows(difference_rows(report.comparisons), folder / "compare_differences", TESTED)
    written.append(write_comparison(report, folder))
    print(f"\nwritten: {', '.join(path.name for path in written)} in {place_text(folder)}")


def embedder(model: str | None) -> Embed | None:
    """What gives records their vectors, with a progress bar, if a model was named.

    Raises:
        UserError: if the model cannot be found or loaded.
    """
    if model is None:
        return None
    import numpy as np

    from trim_lightning.api import load
    from trim_lightning.console.progress import progress_bar

    try:
        scorer = load(model)
    except UserError as error:
        reason = str(error).partition("; ")[0].replace("model.path=", "--embed=", 1)
        raise UserError(f"{reason}; give a model directory, a Hub id or bundled:smollm2_135m") from None

    def embed(records: Sequence[Mapping[str, Any]]) -> NDArray[np.floating[Any]]:
        found = []
        with progress_bar("embed", len(records), unit="records") as bar:
            for start in range(0, len(records), CHUNK):
                found.append(scorer.embed(records[start : start + CHUNK]))
                bar.update(len(found[-1]))
        return np.concatenate(found)

    return embed


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="trim-compare",
        description="Compare selections or fine-tuning runs: one table, overlaps of the coresets, and tests of every "
        "method against random where both have five runs of other draws or training seeds. docs/comparing.md explains "
        "each number.",
    )
    made.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR|SWEEP_DIR", help="output directories, or multirun folders"
    )
    made.add_argument("--output", type=Path, metavar="DIR", help="where compare.html, .csv and .parquet go (default: "
                      "the multirun folder if one is given, else the current directory)")  # fmt: skip
    made.add_argument("--all-pairs", action="store_true", help="test every pair of groups, not only against random")
    made.add_argument("--bootstrap", type=int, default=SAMPLES, metavar="N", help="resamples of the held-out "
                      f"records, for the interval over records only (default {SAMPLES})")  # fmt: skip
    made.add_argument("--embed", metavar="MODEL", help="tell the coresets' diversity by this model's embeddings: "
                      "a directory, a Hub id or bundled:smollm2_135m")  # fmt: skip
    made.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the resamples (default 0)")
    return made
