"""``trim-select init``: a commented config for one's own data."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from trim_lightning.cli.exits import Parser, command
from trim_lightning.console.visible import visible
from trim_lightning.errors import UserError

if TYPE_CHECKING:
    from trim_lightning.records.record_file import RecordFile

FOLDER, NAME = "experiment", "own"
HELD_OUT = "evaluation.path=FILE"


@command
def main(arguments: Sequence[str]) -> None:
    """Parse, look at the files, write the config and say how it is used.

    Raises:
        UserError: for a wrong command line, files that cannot be read as records, or a config that is there already.
    """
    options = parser().parse_args(list(arguments))
    if not options.name.isidentifier():
        raise UserError(f"--name={options.name}: must be of letters, digits and underscores, such as own")
    path = Path(FOLDER, f"{options.name}.yaml")
    from trim_lightning.records.kinds import kind_field

    with tempfile.TemporaryDirectory() as folder:
        pool = None if options.pool is None else opened(options.pool, "pool", Path(folder))
        targets = None if options.targets is None else opened(options.targets, "target", Path(folder))
        if path.exists():
            raise UserError(f"{path}: exists already and is not overwritten; give --name for another, or remove it")
        kind = None if targets is None else kind_field(targets.object(0))
        text = config_text(options.pool, options.targets, told(pool), told(targets), kind or "subtask")
    path.parent.mkdir(exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    print(f"written: {path}")
    print("run it:" if options.pool is not None else "set pool.path and target.path in it, then run it:")
    print(f"  trim-select --config-dir . {FOLDER}={options.name}")
    print("or train on what it picks, and measure what that bought:")
    print(f"  trim-train --config-dir . {FOLDER}={options.name} {HELD_OUT}")


def opened(path: str, what: str, folder: Path) -> RecordFile:
    """The records of one of the user's files, to see that a run can read them.

    Raises:
        UserError: if it cannot.
    """
    from trim_lightning.records.sources import open_records
    from trim_lightning.settings.schema import PoolSettings
    from trim_lightning.store import Store

    return open_records(PoolSettings(source="file", path=path), what=what, seed=0, spool=Store(folder).spool)


def told(records: RecordFile | None) -> str:
    """What was found, as the end of a comment."""
    if records is None:
        return ""
    name = visible(" ".join(records.layout.name.split()))  # it may hold names of fields: a line break ends a comment
    return f" # {len(records):,} records, layout {name}"


def config_text(pool: str | None, targets: str | None, pool_told: str, targets_told: str, kind: str) -> str:
    """The config; without a pool with places to fill in, without targets for a sample of the pool as targets.

    ``kind`` is a field that may divide the targets into groups.
    """
    own = targets is not None or pool is None
    target = (
        f"""\
target:
  path: {as_yaml(targets or "targets.jsonl")}{targets_told}
  num_examples: 10 # drawn by seed; null takes all
  # group_field: {kind} # one bank of fingerprints for each value of this field"""
        if own
        else """\
target:
  num_examples: 10 # records of the pool, drawn by seed, stand for the targets"""
    )
    return f"""\
# @package _global_
# A selection from your own data. Every key: docs/configuration.md, or trim-select --help-all.
defaults:
  - override /pool: file # JSON lines, JSON, CSV, Parquet, Arrow, packed or not; hub for a data set of the Hub
  - override /target: {"file" if own else "from_pool # a few examples of what the model must get good at are better"}
  - override /method: trim # or random, bm25, rds, less, ...: docs/methods.md
  - override /warmup: lora # none scores with the model as it is, and saves the time
  - _self_

# the candidates: a file, a folder, a glob or a list of them; layouts are recognised (docs/data.md)
pool:
  path: {as_yaml(pool or "pool.jsonl")}{pool_told}
  limit: null # only the first N, for a first try
  bad_records: error # or skip: leave out, count and list what cannot be read

# what the model must get good at: five to ten good examples do
{target}

# the scorer, and the model that trim-train trains; the default is the small one that is bundled
# model:
#   path: HuggingFaceTB/SmolLM2-1.7B-Instruct # a Hub id or a directory

# how much is picked: one of fraction, count (records) and tokens
selection:
  fraction: 0.05
  dedup: none # exact or near: no duplicates of better records

max_length: 2048 # tokens of a record that are kept
scope: all # tokens that count: all, prompt or response
seed: 0
"""


def as_yaml(path: str) -> str:
    """A path as a YAML value, in which Hydra looks nothing up."""
    style = None if path.isprintable() else '"'  # a line break is escaped there
    dumped = yaml.safe_dump(path.replace("${", "\\${"), allow_unicode=True, width=10_000, default_style=style)
    return dumped.removesuffix("...\n").strip()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="trim-select init",
        description=f"Write a commented config for your own data to {FOLDER}/{NAME}.yaml in the current folder. "
        "Nothing is asked and nothing overwritten; files that are named are looked into. Without targets a sample of "
        "the pool serves as targets; without a pool the places stay to be filled in.",
    )
    made.add_argument("pool", nargs="?", metavar="POOL", help="the candidates: a file, a folder or a glob")
    made.add_argument("targets", nargs="?", metavar="TARGETS", help="examples of what the model must get good at")
    made.add_argument("--name", default=NAME, metavar="NAME", help=f"name of the config (default {NAME})")
    return made
