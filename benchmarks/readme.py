"""``make readme``: write what README.md says of results and models from the pages of docs/ that hold it.

Between ``<!-- made from NAME -->`` and ``<!-- end -->`` stands what `BLOCKS` makes; `make results` writes it anew with
its pages, and a test fails while it is out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tabulate import tabulate

from trim_lightning.report.page import METHOD_NAMES

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
BLOCK = re.compile(r"(<!-- made from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {**METHOD_NAMES, "random": "**random**", "trim": "**TRIM**", "longest": "longest", "full": "all"}


def filled(text: str) -> str:
    """A README with every block as its page has it now.

    Raises:
        KeyError: for a page that no block is made from, or a table without a column that is wanted.
    """
    return BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]](page(found[2]))}\n\n{found[3]}", text)


def page(name: str) -> str:
    """A page of docs/."""
    return (DOCS / name).read_text(encoding="utf-8")


def results(text: str) -> str:
    """What each method's coreset taught, the most first, and what choosing it cost.

    A page whose head says that its runs are of before a change keeps that sentence, and no verdict is taken from it.
    """
    table, cost = table_with(text, "drop of held-out loss"), page("results/cost.md")
    seconds = {
        line["run"].partition(" ")[0]: line["selection, s"] for line in reversed(table_with(cost, "selection, s"))
    }
    told = re.search(r"^> (.+)$", text, re.MULTILINE)
    tests = [] if told else table_with(text, "against random")
    verdicts = {line["run"]: line["against random"] for line in tests if line["metric"] == "held-out loss"}
    table = [line for line in table if line["drop of held-out loss"]]
    table.sort(key=lambda line: -float(line["drop of held-out loss"].partition(" ")[0]))
    rows = [
        {
            "coreset of": NAMES.get(line["run"], line["run"]),
            "runs": line["seeds"],
            "drop of the held-out loss": line["drop of held-out loss"],
            **({} if told else {"against random": verdicts.get(line["run"], "")}),
            "tokens through the model to choose it": line["tokens fed in selection"],
            f"seconds to choose from {pool_of(cost)}": seconds.get(line["run"], ""),
        }
        for line in table
    ]
    note = ["*" + told[1].replace("](../", "](docs/") + "*"] if told else []
    return "\n\n".join([*note, tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)])


def models(text: str) -> str:
    """How many model types work."""
    (found,) = re.findall(r"^Of transformers [^.]+\.[^.]+\.\d+'s .+? not at all\.", text, re.MULTILINE)
    return str(found)


def table_with(text: str, column: str) -> list[dict[str, str]]:
    """The first table of a page that has a column, each line by the names of its columns."""
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
        if column in head:
            return [dict(zip(head, row, strict=True)) for row in rows]
    raise KeyError(column)


def pool_of(text: str) -> str:
    """The size of the pool that a page names."""
    found = re.search(r"random sample of ([\d,]+)", text)
    return "a pool" if found is None else f"{found[1]} records"


BLOCKS = {"results/method_table.md": results, "compatibility.md": models}


def main() -> int:
    """Write README.md if something in it has changed."""
    text = README.read_text(encoding="utf-8")
    if (now := filled(text)) != text:
        README.write_text(now, encoding="utf-8")
        print(README.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
