"""``make readme``: write what README.md says of results and models from the pages of docs/ that hold it.

Between ``<!-- made from NAME -->`` and ``<!-- end -->`` stands what `BLOCKS` makes; `make results` writes it anew with
its pages, and a test fails while it is out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
BLOCK = re.compile(r"(<!-- made from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {
    "trim_plus": "**TRIM+** (`method=trim_plus`)", "trim": "**TRIM**", "rds": "RDS+", "dsir": "DSIR", "less": "LESS",
    "trim, uniform saliency": "TRIM, every token weighs the same", "bm25": "BM25", "ifd": "IFD",
    "perplexity": "perplexity", "longest": "longest",
    "random scores (20 draws)": "**random**", "noise ceiling": "the best possible, given the noise",
}  # fmt: skip


def filled(text: str) -> str:
    """A README with every block as its page has it now.

    Raises:
        KeyError: for a page that no block is made from, or a table without a column that is wanted.
    """
    return BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]](page(found[2]))}\n\n{found[3]}", text)


def page(name: str) -> str:
    """A page of docs/."""
    return (DOCS / name).read_text(encoding="utf-8")


def value(text: str) -> str:
    """How well each method of the package tells what records teach, the best first, and what telling it takes.

    Formulas that only the instrument knows, and a method's variants beyond TRIM's saliency, are left to the page.
    """
    best = {line["method"]: line["mean, deviations"] for line in table_with(text, "mean, deviations")}
    passes = {line["method"]: line["passes"] for line in table_with(text, "passes")}
    rows = [
        {
            "score": NAMES[line["method"]],
            "order of what groups teach": line["Spearman"],
            "gain of the best tenth": best.get(line["method"], ""),
            "passes over the pool": passes.get(line["method"], ""),
        }
        for line in table_with(text, "Spearman")
        if line["method"] in NAMES
    ]
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


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


BLOCKS = {"results/value.md": value, "compatibility.md": models}


def main() -> int:
    """Write README.md if something in it has changed."""
    text = README.read_text(encoding="utf-8")
    if (now := filled(text)) != text:
        README.write_text(now, encoding="utf-8")
        print(README.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
