"""Keys never leave this machine, nor stand in its logs."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from trim_lightning.console.visible import visible

HIDDEN = "***"
SHORTEST_KEY = 8  # characters of a variable's value; shorter ones (1, true) would be found everywhere
SECRET_NAME = re.compile(
    r"passw(or)?d|secret|(key|token|passphrase|credentials?)(_|$)|(^|_)auth(_|$)|_(pwd|pat)(_|$)", re.IGNORECASE
)
ASSIGNED = r"(?:api[_-]?key|access[_-]?key|secret(?:[_-]?(?:access[_-]?)?key)?|token|passw(?:or)?d|passphrase)"
PATTERNS = (
    # user:password@ in an address
    (re.compile(r"(?<=://)[^/\s@'\"]+@"), f"{HIDDEN}@"),
    # ?token=..., api_key=...
    (re.compile(rf"(?i)((?<![^\W_]){ASSIGNED}=[\"']?)[^\s'\"&,\]}})#]+"), rf"\g<1>{HIDDEN}"),
    (re.compile(r"(?i)([?&][\w-]*(?:signature|sig|credential)=)[^\s'\"&#]+"), rf"\g<1>{HIDDEN}"),
    # keys that are known by their looks
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[opsur]_[A-Za-z0-9]{20,}"
            r"|github_pat_\w{20,}|glpat-[\w-]{20,}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,})"
        ),
        HIDDEN,
    ),
)


def hide_keys(text: str) -> str:
    """Put ``***`` for keys: values of variables that are named like one, passwords in addresses, known forms."""
    for value in secret_values():
        text = text.replace(value, HIDDEN)
    for pattern, instead in PATTERNS:
        text = pattern.sub(instead, text)
    return text


def secret_values() -> list[str]:
    """Values of environment variables whose names say that they are keys, the longest first.

    The name of a file or folder that is there (``GOOGLE_APPLICATION_CREDENTIALS``, ``SSH_AUTH_SOCK``) is none.
    """
    found = {
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_KEY and not value.isspace()
        if not (value.startswith(("/", "~/")) and os.path.exists(os.path.expanduser(value)))
    }
    return sorted(found, key=len, reverse=True)


class LogFormatter(logging.Formatter):
    """Log lines, and the tracebacks in them: without keys, and what data holds moves no cursor and sets no colour."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return visible(hide_keys(super().format(record)))


class KeylessFormatter(logging.Formatter):
    """What another formatter writes, without keys; the message and the traceback set no colour, the formatter may."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        shown = copy.copy(record)
        shown.msg, shown.args = visible(record.getMessage()), None
        if record.exc_info:
            shown.exc_text = visible(self.inner.formatException(record.exc_info))
        return hide_keys(self.inner.format(shown))


def hide_keys_in_logs() -> None:
    """Let no handler write keys, whichever formatter the user gave it (``hydra/job_logging=colorlog``)."""
    known = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for handler in [handler for logger in known if isinstance(logger, logging.Logger) for handler in logger.handlers]:
        if not isinstance(handler.formatter, LogFormatter | KeylessFormatter):
            handler.setFormatter(KeylessFormatter(handler.formatter or logging.Formatter()))


class KeylessStream:
    """A text stream that hides keys in what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text without keys."""
        self._stream.write(hide_keys(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the texts without keys."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._stream, name)


def hide_keys_in(files: Sequence[Path]) -> None:
    """Hide keys in text files that a library wrote; a file that cannot be changed is left."""
    from trim_lightning.files.atomic import write_text  # not above: --help loads nothing heavy

    for file in files:
        with suppress(OSError, UnicodeDecodeError):
            text = file.read_text(encoding="utf-8")
            # a value that is a key as a whole: bare asterisks are no YAML
            clean = re.sub(r"(?m)^(\s*(?:- )*(?:[\w.]+: )?)\*\*\*$", r"\1'***'", hide_keys(text))
            if clean != text:
                write_text(clean, file)
