"""``trim-export``: the coreset of a run in the files that a trainer reads."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trim_lightning.cli.exits import Parser, command
from trim_lightning.console.amounts import place_text
from trim_lightning.errors import UserError
from trim_lightning.files.json_files import read_json_object

RECEIPT = "export.json"
NAMES = ("jsonl", "messages", "alpaca", "parquet")


@command
def main(arguments: Sequence[str]) -> None:
    """Parse, export and say what was written.

    Raises:
        UserError: for a wrong command line, or a run whose coreset cannot be exported.
    """
    options = parser().parse_args(list(arguments))
    directory = options.output or options.run / "export" / options.format
    names, responses_missing = export(options.run, options.format, directory)
    print(f"written: {', '.join(names)} in {place_text(directory)}")
    if responses_missing:
        print(
            f"warning: {responses_missing} of the records end without an assistant turn: there is nothing to train on"
        )


def export(run_directory: Path, format_name: str, directory: Path) -> tuple[list[str], int]:
    """Write the bundle: the data, scores and ids aligned by line, and ``export.json`` last.

    Args:
        run_directory: A selection run, or a training run that selected.
        format_name: One of `NAMES`.
        directory: Where the files go.

    Returns:
        Names of the files written, and how many records lack a response.

    Raises:
        UserError: if there is no finished selection, a record does not fit the format, or the directory holds an
            export in another format.
    """
    from trim_lightning.files.atomic import write_text
    from trim_lightning.files.tables import write_table
    from trim_lightning.records.record_file import sha256_of
    from trim_lightning.runs.chosen import open_chosen
    from trim_lightning.runs.formats import FORMATS, write_score_lines
    from trim_lightning.runs.names import SCORES

    chosen = open_chosen(run_directory)
    refuse_mixture(directory, format_name)
    (directory / RECEIPT).unlink(missing_ok=True)
    files, order = FORMATS[format_name](chosen.records, chosen.file, directory)
    scores = chosen.scores.take(order)
    side = directory / (SCORES if format_name == "parquet" else "scores.jsonl")
    (write_table if format_name == "parquet" else write_score_lines)(scores, side)
    files.append(side)
    shared = chosen.manifest.content  # without the paths of this machine
    receipt: dict[str, Any] = {
        "format": format_name,
        "records": len(chosen.records),
        "coreset_sha256": chosen.records.sha256,
        "files": {path.name: sha256_of(path, str(path)) for path in files},
        "method": shared["config"].get("method"),
        "selection": shared["config"].get("selection"),
        "inputs": shared["inputs"],
        "trim-lightning": version("trim-lightning"),
    }
    write_text(json.dumps(receipt, indent=2, ensure_ascii=False) + "\n", directory / RECEIPT)
    records = chosen.records
    missing = sum(not ends_with_response(records.record(row).turns) for row in range(len(records)))
    return [*(path.name for path in files), RECEIPT], missing


def ends_with_response(turns: Sequence[Any]) -> bool:
    """True if the last turn is the assistant's and says something."""
    return bool(turns) and turns[-1].role == "assistant" and turns[-1].trained and bool(turns[-1].text)


def refuse_mixture(directory: Path, format_name: str) -> None:
    """Keep one export per folder: the side file is aligned with one of them only.

    Raises:
        UserError: if the directory holds an export in another format.
    """
    try:
        held = read_json_object(directory / RECEIPT).get("format")
    except (OSError, ValueError):
        return
    if held != format_name:
        raise UserError(f"--output={directory}: holds an export in the format {held}; name another folder")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="trim-export",
        description="Write the coreset of a run in a layout that other trainers read unchanged, with scores and ids in "
        "a side file aligned by line. docs/exporting.md shows how each trainer is pointed at it.",
    )
    made.add_argument("run", type=Path, metavar="RUN", help="output directory of a selection or of a training run")
    meaning = (
        "jsonl: the input lines byte for byte; messages: JSON lines of role and content (TRL, Axolotl); parquet: the "
        "same as Parquet; alpaca: JSON lines with dataset_info.json (LLaMA-Factory)"
    )
    made.add_argument("--format", required=True, choices=NAMES, help=meaning)
    made.add_argument("--output", type=Path, metavar="DIR", help="where the files go (default RUN/export/FORMAT)")
    return made
