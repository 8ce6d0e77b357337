"""``trim-explain``: why was this record picked, why not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trim_lightning.cli.exits import Parser, command
from trim_lightning.console.terminal import wants_colour
from trim_lightning.errors import UserError


@command
def main(arguments: Sequence[str]) -> None:
    """Parse, explain, print and write.

    Raises:
        UserError: for a wrong command line, an unknown record, or a run whose pieces are gone.
    """
    options = parser().parse_args(list(arguments))
    if options.response is not None and options.text is None:
        raise UserError("--response: belongs to --text, which is the prompt")
    from trim_lightning.files.atomic import write_text
    from trim_lightning.records.record import Turn
    from trim_lightning.report.explain import explain_row, explain_text
    from trim_lightning.report.explain_text import explanation_page, terminal_text
    from trim_lightning.runs.reopened import open_run

    opened = open_run(options.run, options.store, trusted=options.trust_remote_code)
    if options.text is not None:
        turns = [Turn("user", options.text)]
        if options.response is not None:
            turns.append(Turn("assistant", options.response))
        found = explain_text(opened, turns)
    else:
        found = explain_row(opened, options.row if options.id is None else opened.row_of(options.id))
    print(terminal_text(found, wants_colour(options.color)))
    if options.html is not None:
        write_text(explanation_page(found, opened), options.html)
        print(f"\nwritten: {options.html}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="trim-explain",
        description="Show why a selection picked a record, or why not: its rank, the parts of its score, and every "
        "token with the target token that it matched. docs/reports.md explains what is shown.",
    )
    made.add_argument("run", type=Path, metavar="RUN", help="output directory of a selection or of a training run")
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--row", type=int, metavar="N", help="the record's place in the pool, from 0")
    which.add_argument("--id", metavar="ID", help="the record's id")
    which.add_argument("--text", metavar="TEXT", help="a text that the pool need not hold, scored now as a user's turn")
    made.add_argument("--response", metavar="TEXT", help="with --text: the assistant's turn after it")
    made.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page")
    made.add_argument("--store", type=Path, metavar="DIR", help="the stage store, if it is not where the run had it")
    made.add_argument("--trust-remote-code", action="store_true",
                      help="with --text: let the model run its own code, as the run did")  # fmt: skip
    made.add_argument("--color", choices=("auto", "always", "never"), default="auto",
                      help="colours in the terminal (default auto: on a terminal, unless NO_COLOR is set)")  # fmt: skip
    return made
