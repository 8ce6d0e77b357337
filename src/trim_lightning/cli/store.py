"""``trim-store``: what the stage store holds, whether it is whole, and what can go."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from trim_lightning.cli.exits import Parser, command
from trim_lightning.console.amounts import size_text
from trim_lightning.console.visible import visible
from trim_lightning.errors import UserError
from trim_lightning.store.inventory import Item, chosen, damage, delete, items, receipt_of
from trim_lightning.store.receipt import SAMPLED, StoreError
from trim_lightning.store.store import LOCKS

DEFAULT = ".trim_store"
DAY = 86_400.0
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
AGES = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


@command
def main(arguments: Sequence[str]) -> None:
    """Parse and do it.

    Raises:
        UserError: for a wrong command line, a store that is not there, or damaged entries.
    """
    options = parser().parse_args(list(arguments))
    root = Path(options.store or os.environ.get("TRIM_STORE_DIR") or DEFAULT).expanduser()
    if not root.is_dir():
        raise UserError(f"--store={root}: no such directory; name a store, or set TRIM_STORE_DIR")
    if not (root / "locks").is_dir() and any(root.iterdir()):
        raise UserError(f"--store={root}: is no stage store (it has no locks folder); name one, or set TRIM_STORE_DIR")
    options.task(root, options)


def list_entries(root: Path, options: argparse.Namespace) -> None:
    """Print a table of everything, and the sums."""
    found = [item for item in items(root) if not options.stage or item.stage in options.stage]
    rows = [
        [item.stage, item.name if not item.finished else item.name[:12], size_text(item.size), age(item.made),
         age(item.used)]
        for item in found
    ]  # fmt: skip
    if rows:
        alignment = ("left", "left", *["right"] * 3)
        print(visible(tabulate(rows, headers=["stage", "key", "size", "made", "used"], colalign=alignment)))
    print(f"\n{len(found)} entries, {size_text(sum(item.size for item in found))}")


def show(root: Path, options: argparse.Namespace) -> None:
    """Print the receipt of one entry.

    Raises:
        UserError: if no entry, or several, begin with that key, or its receipt is damaged.
    """
    item = by_key(root, options.key)
    try:
        print(json.dumps(receipt_of(item.path), indent=2))  # ASCII: no control character passes
    except StoreError as error:
        raise UserError(f"{options.key}: {error}; trim-store verify --delete removes what is damaged") from None


def verify(root: Path, options: argparse.Namespace) -> None:
    """Compare the sizes of all files of every entry, and checksums of samples, or of all.

    Raises:
        UserError: if an entry is damaged and stays.
    """
    found = [by_key(root, key) for key in options.key] or [item for item in items(root) if item.finished]
    bad = {item: problem for item in found if (problem := damage(root, item, options.whole)) is not None}
    left = 0
    for item, problem in bad.items():
        gone = options.delete and delete(root, item, options.lock)
        left += not gone
        print(visible(f"{item.stage}/{item.name[:12]}: {problem}{', deleted' if gone else ''}"))
    print(f"{len(found) - len(bad)} of {len(found)} entries are whole")
    sampled = sum(item.size > SAMPLED for item in found) if not options.whole else 0
    if sampled:
        print(f"{sampled} of them by their sizes and samples; trim-store verify --whole reads every byte")
    if left:
        raise UserError(
            f"{left} damaged entries; a run that needs one computes it again, trim-store verify --delete removes it"
        )


def prune(root: Path, options: argparse.Namespace) -> None:
    """Delete what matches, or say what would be deleted.

    Raises:
        UserError: if nothing says what to delete.
    """
    if not (options.unused or options.keep or options.stage or options.all):
        raise UserError("prune: say what may go: --unused 30d, --keep 100G, --stage score, or --all")
    taken = chosen(
        items(root),
        stages=options.stage,
        unused_seconds=None if options.unused is None else seconds_of(options.unused),
        keep_bytes=None if options.keep is None else bytes_of(options.keep),
    )
    # what a run asked for a moment ago it may still be reading
    young = [item for item in taken if time.time() - item.used < DAY and not options.force]
    gone, busy = [], 0
    for item in taken:
        if item in young:
            continue
        if not options.dry_run and not delete(root, item, options.lock):
            busy += 1
            continue
        gone.append(item)
        print(visible(f"{item.stage}/{item.name[:12]} {size_text(item.size)}, unused for {age(item.used)}"))
    verb = "would be deleted" if options.dry_run else "deleted"
    print(f"{len(gone)} entries {verb}, {size_text(sum(item.size for item in gone))}")
    if young:
        print(f"{len(young)} left: used within the last day; --force takes them, if no run is using the store")
    if busy:
        print(f"{busy} left: a running process is building them")


def by_key(root: Path, key: str) -> Item:
    """The one finished entry whose key begins so.

    Raises:
        UserError: if there is none, or more than one.
    """
    stage, _, beginning = key.rpartition("/")
    found = [
        item for item in items(root) if item.finished and item.name.startswith(beginning) and stage in ("", item.stage)
    ]
    if len(found) != 1:
        what = "no entry" if not found else f"{len(found)} entries"
        raise UserError(f"{key}: {what} with a key that begins so; trim-store list shows them")
    return found[0]


def seconds_of(text: str) -> float:
    """Seconds of an age such as ``30d`` or ``12h``.

    Raises:
        UserError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None:
        raise UserError(f"--unused={text}: give an age such as 12h, 30d or 8w")
    return float(match[1]) * AGES[match[2]]


def bytes_of(text: str) -> int:
    """Bytes of a size such as ``100G``.

    Raises:
        UserError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)b?", text.lower())
    if match is None:
        raise UserError(f"--keep={text}: give a size such as 500M or 100G")
    return int(float(match[1]) * UNITS[match[2]])


def age(moment: float) -> str:
    """How long ago, for people."""
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="trim-store",
        description="Look after the stage store: results of expensive stages, shared by runs (docs/store.md).",
    )
    made.add_argument("--store", metavar="DIR", help=f"the store (default: TRIM_STORE_DIR, else {DEFAULT})")
    made.add_argument("--lock", choices=LOCKS, default="file", help="paths.store_lock of the runs that use it")
    anywhere = Parser(add_help=False)  # both may stand behind the command too
    anywhere.add_argument("--store", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    anywhere.add_argument("--lock", choices=LOCKS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    tasks = made.add_subparsers(dest="command", required=True, metavar="list|show|verify|prune")
    listing = tasks.add_parser(
        "list", help="every entry with size, age and last use, largest first", parents=[anywhere]
    )
    listing.add_argument("--stage", action="append", metavar="STAGE", help="only this stage (may be repeated)")
    listing.set_defaults(task=list_entries)
    showing = tasks.add_parser("show", help="what one entry was made from, its files and checksums", parents=[anywhere])
    showing.add_argument("key", help="the beginning of its key")
    showing.set_defaults(task=show)
    checking = tasks.add_parser(
        "verify",
        help="compare sizes, and checksums of samples; exit code 2 if an entry is damaged",
        parents=[anywhere],
    )
    checking.add_argument("key", nargs="*", help="only entries whose keys begin so")
    checking.add_argument("--whole", action="store_true", help="read every byte of every file")
    checking.add_argument("--delete", action="store_true", help="delete damaged entries")
    checking.set_defaults(task=verify)
    pruning = tasks.add_parser(
        "prune", help="delete entries; the next run computes what it needs again", parents=[anywhere]
    )
    pruning.add_argument("--unused", metavar="AGE", help="what no run has asked for since: 12h, 30d, 8w")
    pruning.add_argument("--keep", metavar="SIZE", help="the longest unused, until the store is this small: 100G")
    pruning.add_argument("--stage", action="append", metavar="STAGE", help="only this stage (may be repeated)")
    pruning.add_argument("--all", action="store_true", help="everything")
    pruning.add_argument("--force", action="store_true", help="also what was used within the last day")
    pruning.add_argument("--dry-run", action="store_true", help="only say what would go")
    pruning.set_defaults(task=prune)
    return made
