"""The errors a user can cause and cure: one line that says what, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the config, the data or the model that the user can mend.

    The entry points print its message as ``error: <message>`` on one line and exit with 2, without a
    traceback. Say what is wrong, where (file, line or key), and what to do about it.
    """


def first_line(error: BaseException) -> str:
    """First line of an exception's text."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(":. ") if lines else type(error).__name__


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like a mistyped one, None if none is as similar as ``cutoff`` (0 to 1)."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean X?"`` if a known name is close, with ``prefix`` before it, else the empty string."""
    guess = nearest(name, known)
    return f"; did you mean {prefix}{guess}?" if guess else ""
