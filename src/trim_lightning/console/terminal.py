"""What a terminal takes: colours where they are wanted, lines of 80 columns."""

from __future__ import annotations

import os
import sys
import textwrap
import unicodedata
from collections.abc import Sequence

WIDTH = 80  # columns of a closing table


def wants_colour(choice: str = "auto") -> bool:
    """True if colours are asked for, or may be shown: on a terminal, unless NO_COLOR is set."""
    if choice != "auto":
        return choice == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def columns_of(text: str) -> int:
    """Columns that a text takes on a terminal: two for a wide character, none for a combining one."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text
    )


def cut(text: str, width: int) -> str:
    """The text in one line of at most so many columns, its end replaced by ``…`` where it is longer."""
    text = " ".join(text.split())
    if columns_of(text) <= width:
        return text
    while columns_of(text) > width - 1:
        text = text[: width - 1] if len(text) > width else text[:-1]
    return text.rstrip() + "…"


def wrapped(text: str, first: str = "", rest: str = "") -> str:
    """The text in lines of at most `WIDTH` columns; a word that is longer, such as a path, stays whole."""
    wrapper = textwrap.TextWrapper(
        WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.fill(text)


def pairs_text(rows: Sequence[Sequence[object]]) -> str:
    """Lines of a name and what belongs to it, in two columns."""
    width = max(len(str(name)) for name, _ in rows) + 2
    return "\n".join(wrapped(str(text), f"{name!s:<{width}}", " " * width) for name, text in rows)
