"""``trim-export``: the coreset of a run in the files that a trainer reads, or its scores in those of a benchmark."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_lightning.cli.exits import Parser, command
from trim_lightning.console.amounts import place_text
from trim_lightning.errors import UserError
from trim_lightning.files.json_files import read_json_object

if TYPE_CHECKING:
    from trim_lightning.runs.manifest import Manifest

RECEIPT = "export.json"
NAMES = ("jsonl", "messages", "alpaca", "sharegpt", "parquet")
SCORES_ALONE = ("critical_look", "date_lm", "bergson")  # of the whole pool
OF_HUB = "parquet"  # the format of a data set on the Hub, unless another is named


@command
def main(arguments: Sequence[str]) -> None:
    """Parse, export and say what was written.

    Raises:
        UserError: for a wrong command line, or a run whose coreset cannot be exported.
    """
    options = parser().parse_args(list(arguments))
    name = options.push_to_hub
    if name is None and options.format is None:
        raise UserError(f"--format: one of {', '.join((*NAMES, *SCORES_ALONE))} is needed; trim-export --help explains")
    if name is None and (options.public or options.dry_run):
        raise UserError("--public and --dry-run: belong to --push-to-hub NAME")
    format_name = options.format or OF_HUB
    directory = options.output or options.run / "export" / format_name
    if format_name in SCORES_ALONE:
        if name is not None:
            raise UserError(f"--push-to-hub={name}: {format_name} holds no records; give one of {', '.join(NAMES)}")
        names, unscored = export_scores(options.run, format_name, directory, options.task)
        print(f"written: {', '.join(names)} in {place_text(directory)}")
        if unscored:
            print(f"warning: {unscored} records of the pool have no score: they stand below all others")
        return
    if options.task is not None:
        raise UserError(f"--task={options.task}: names the file of --format critical_look, not of {format_name}")
    if name is not None:
        from trim_lightning.runs.hub import check_name, push

        check_name(name)
    names, responses_missing = export(options.run, format_name, directory)
    if name is not None:
        files = (names[0], side_file(format_name))
        names.append(write_card(options.run, files, directory, name, asks_hub=not options.dry_run))
    print(f"written: {', '.join(names)} in {place_text(directory)}")
    if responses_missing:
        print(
            f"warning: {responses_missing} of the records end without an assistant turn: there is nothing to train on"
        )
    if name is not None:
        if options.dry_run:
            kind = "public" if options.public else "private"
            print(f"dry run: nothing was pushed; this folder would be the {kind} data set {name}")
        else:
            address, private = push(directory, names, name, options.public)
            print(f"pushed: {address} ({'private' if private else 'public'})")
            if options.public and private:
                print(
                    "warning: --public: the data set was there already and stays private; the Hub's settings change it"
                )


def write_card(run: Path, files: tuple[str, str], directory: Path, name: str, *, asks_hub: bool) -> str:
    """Write the card of the data set beside its ``files``, the records and their scores, and return its name.

    What the pool's own card says of its licence is asked of the Hub with ``asks_hub`` alone.
    """
    from trim_lightning.files.atomic import write_text
    from trim_lightning.runs.card import card_text, hub_pool
    from trim_lightning.runs.chosen import open_chosen
    from trim_lightning.runs.hub import CARD, card_of

    chosen = open_chosen(run)
    manifest = chosen.manifest.content
    source = hub_pool(manifest)
    pool_card = card_of(source) if asks_hub and source else {}
    write_text(
        card_text(name, manifest, chosen.records, files, pool_card),
        directory / CARD,
    )
    return CARD


def side_file(format_name: str) -> str:
    """Name of the file with their scores."""
    return "scores.parquet" if format_name == "parquet" else "scores.jsonl"


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
    from trim_lightning.files.tables import write_table
    from trim_lightning.runs.chosen import open_chosen
    from trim_lightning.runs.formats import FORMATS, write_score_lines

    chosen = open_chosen(run_directory)
    refuse_mixture(directory, format_name)
    (directory / RECEIPT).unlink(missing_ok=True)
    files, order = FORMATS[format_name](chosen.records, chosen.file, directory)
    scores = chosen.scores.take(order)
    side = directory / side_file(format_name)
    (write_table if format_name == "parquet" else write_score_lines)(scores, side)
    files.append(side)
    records = chosen.records
    told = {"records": len(records), "coreset_sha256": records.sha256}
    names = write_receipt(chosen.manifest, format_name, told, files, directory)
    missing = sum(not ends_with_response(records.record(row).turns) for row in range(len(records)))
    return names, missing


def export_scores(run_directory: Path, format_name: str, directory: Path, task: str | None) -> tuple[list[str], int]:
    """Write the scores of the whole pool, in pool order, and ``export.json`` last.

    Args:
        run_directory: A selection run, or a training run that selected.
        format_name: One of `SCORES_ALONE`.
        directory: Where the files go.
        task: Name of the target set, for ``critical_look``.

    Returns:
        Names of the files written, and how many records have no score.

    Raises:
        UserError: if there is no finished selection, it has not the scores that the format wants, or the directory
            holds an export in another format.
    """
    from trim_lightning.runs.yardsticks import YARDSTICKS, read_pool_scores

    if task is not None and (format_name != "critical_look" or not re.fullmatch(r"[\w-]+", task)):
        raise UserError(f"--task={task}: is a word that begins the file of --format critical_look, such as gsm8k")
    found = read_pool_scores(run_directory, task)
    refuse_mixture(directory, format_name)
    (directory / RECEIPT).unlink(missing_ok=True)
    files = YARDSTICKS[format_name](found, directory)
    told = {"records": len(found.scores), "unscored": found.unscored, "queries": list(found.queries)}
    return write_receipt(found.manifest, format_name, told, files, directory), found.unscored


def write_receipt(
    manifest: Manifest, format_name: str, told: Mapping[str, Any], files: Sequence[Path], directory: Path
) -> list[str]:
    """Write ``export.json`` and give the names of all files."""
    from trim_lightning.files.atomic import write_text
    from trim_lightning.records.record_file import sha256_of

    shared = manifest.content  # without the paths of this machine
    receipt: dict[str, Any] = {
        "format": format_name,
        **told,
        "files": {path.name: sha256_of(path, str(path)) for path in files},
        "method": shared["config"].get("method"),
        "selection": shared["config"].get("selection"),
        "inputs": shared["inputs"],
        "trim-lightning": version("trim-lightning"),
    }
    write_text(json.dumps(receipt, indent=2, ensure_ascii=False) + "\n", directory / RECEIPT)
    return [*(path.name for path in files), RECEIPT]


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
        "a side file aligned by line, or the scores of the whole pool as benchmarks of selection methods read them. "
        "docs/exporting.md shows how each is pointed at it.",
    )
    made.add_argument("run", type=Path, metavar="RUN", help="output directory of a selection or of a training run")
    meaning = (
        "jsonl: the input lines byte for byte; messages: JSON lines of role and content (TRL, Axolotl, Unsloth); "
        "parquet: the same as Parquet; alpaca, sharegpt: JSON lines with dataset_info.json (LLaMA-Factory); "
        "critical_look, date_lm, bergson: scores in pool order for these benchmarks"
    )
    made.add_argument("--format", choices=(*NAMES, *SCORES_ALONE), help=meaning)
    made.add_argument("--task", metavar="NAME", help="begins the file of critical_look (default: that of the targets)")
    made.add_argument("--output", type=Path, metavar="DIR", help="where the files go (default RUN/export/FORMAT)")
    made.add_argument("--push-to-hub", metavar="NAME", help="make it the data set NAME (USER/NAME) of the Hugging Face "
                      "Hub, private, with a card that tells how it was selected; --format is then by default "
                      f"{OF_HUB}")  # fmt: skip
    made.add_argument("--public", action="store_true", help="with --push-to-hub: everyone may see it")
    made.add_argument("--dry-run", action="store_true",
                      help="with --push-to-hub: only write the folder; needs no network")  # fmt: skip
    return made
