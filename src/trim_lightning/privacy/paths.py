"""What may leave this machine: keys never, paths only by name.

Two kinds of files are told apart. What is meant to be shown to others (manifest, pages, exports, what a tracker
gets) goes through `shareable`. What stays here (the log, Hydra's own record, messages on the terminal) keeps its
paths, and goes through `hide_keys`. The paths that a manifest leaves out stay beside it in ``local.json``, where
``trim-explain`` and ``trim-compare`` look them up.
"""

from __future__ import annotations

import copy
import functools
import getpass
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from trim_lightning.files.json_files import read_json_object
from trim_lightning.report.escape import visible

LOCAL = "local.json"
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
# a slash that begins a path of at least two parts: not that of an address, a fraction, or a word/word
PART = r"[^\s/'\",;:=\[\]{}()<>|]+"
ABSOLUTE = re.compile(rf"(?<![\w.~:/*-])(?:file://)?/(?:{PART}/)+(?:{PART})?")


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
        if not (value.startswith(("/", "~/")) and exists(os.path.expanduser(value)))
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
    from trim_lightning.pipeline.outputs import write_text  # not above: --help loads nothing heavy

    for file in files:
        with suppress(OSError, UnicodeDecodeError):
            text = file.read_text(encoding="utf-8")
            # a value that is a key as a whole: bare asterisks are no YAML
            clean = re.sub(r"(?m)^(\s*(?:- )*(?:[\w.]+: )?)\*\*\*$", r"\1'***'", hide_keys(text))
            if clean != text:
                write_text(clean, file)


def shareable(value: Any) -> Any:
    """Hide keys, this machine's paths and the user's name in every text of a JSON-like value.

    A path below the working directory is written relative to it, any other as ``.../name``.
    """
    if isinstance(value, str):
        return shareable_text(value)
    if isinstance(value, Mapping):
        return {name: shareable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    return value


def shareable_text(text: str) -> str:
    """The same for one text, which may be a path as a whole or hold some."""
    text = hide_keys(text)
    if is_path(text):
        return short(text)
    if "/" in text and "\n" not in text and exists(text):  # a relative path, not the id of a model on the Hub
        return without_user(text)
    home = os.path.expanduser("~").rstrip(os.sep)
    if home.count(os.sep) > 1:  # it may have blanks, where the pattern would end
        own = rf"(?<![\w.~-]){re.escape(home)}(?:/{PART})*(?=$|[^\w.-])"
        text = re.sub(own, lambda match: short(match.group()), text)
    return ABSOLUTE.sub(lambda match: short(match.group()), text)


def shareable_command(words: Sequence[str]) -> list[str]:
    """The words of a command line; the value after the first ``=`` of each may be a path with blanks."""
    cleaned = []
    for word in words:
        name, sign, value = word.partition("=")
        whole = hide_keys(word)
        cleaned.append(f"{name}={shareable_text(value)}" if sign and is_path(value) else shareable_text(whole))
    return cleaned


def is_path(text: str) -> bool:
    """True for a text that is one absolute path, be it one that begins with ``~``."""
    return text.startswith(("/", "~/", "file:///")) and "\n" not in text and text.count("/") > text.startswith("/")


def short(path: str) -> str:
    """A path relative to the working directory if it is below, else ``.../`` and its name; without the user's name."""
    plain = os.path.normpath(os.path.expanduser(path.removeprefix("file://")))
    cwd, home = working_directory(), os.path.expanduser("~")
    if plain == cwd:
        return "."
    # a working directory above the home directory would show it
    if cwd and within(plain, cwd) and not (within(home, cwd) and within(plain, home)):
        return without_user(os.path.relpath(plain, cwd))
    return "~" if plain == home else without_user(f".../{os.path.basename(plain)}")


def exists(text: str) -> bool:
    """True if a file or folder has this name."""
    try:
        return os.path.exists(text)
    except ValueError:
        return False


def within(path: str, folder: str) -> bool:
    """True if a path is in a folder, or is it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def working_directory() -> str | None:
    """Where the command runs; None if that is the root, or gone."""
    try:
        where = os.getcwd()
    except OSError:
        return None
    return None if where == os.sep else where


def without_user(path: str) -> str:
    """A path without the user's name as one of its parts."""
    name = user_name()
    return path if name is None else "/".join("user" if part == name else part for part in path.split("/"))


@functools.cache
def user_name() -> str | None:
    """Who runs this; None for ``root``, which names nobody."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):
        return None
    return None if name in ("root", "user", "") else name


def run_name(directory: Path) -> str:
    """What a run is called in titles and by a tracker.

    The last two parts of its place below the working directory (a date and a time, as a rule); of a directory
    elsewhere its own name, for what is above may name a user. A job's number and a training's ``selection`` take
    the folder's name with them.
    """
    where = directory.absolute()
    try:
        parts = where.relative_to(Path.cwd()).parts[-2:]
    except (ValueError, OSError):
        alone = not (where.name.isdigit() or where.name == "selection")
        parts = where.parts[-1:] if alone else where.parts[-2:]
    home = Path.home()
    kept = [part for part in parts if part not in (user_name(), home.name)] or ["run"]
    return "/".join(kept)


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The texts of nested mappings and lists by dotted key."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, f"{prefix}{name}.")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from leaves(item, f"{prefix}{place}.")
    elif isinstance(value, str):
        yield prefix.removesuffix("."), value


def write_local(config: Mapping[str, Any], directory: Path) -> None:
    """Keep the paths that the manifest leaves out, by dotted config key, each with what the manifest has instead."""
    from trim_lightning.pipeline.outputs import write_text

    here = {name: hide_keys(text) for name, text in leaves(config)}
    content = {
        "note": "the paths of this machine that manifest.json leaves out; not meant to be shared",
        "config": {
            name: {"shared": shareable_text(text), "here": text}
            for name, text in here.items()
            if shareable_text(text) != text
        },
    }
    write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", directory / LOCAL)


def read_local(directory: Path) -> dict[str, dict[str, str]]:
    """The paths that a run's manifest leaves out, as `write_local` keeps them; none if the run came without them."""
    try:
        found = read_json_object(directory / LOCAL)["config"]
        return {
            str(name): {"shared": str(entry["shared"]), "here": str(entry["here"])} for name, entry in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def with_local(config: Any, paths: Mapping[str, Mapping[str, str]], prefix: str = "") -> Any:
    """A manifest's config with the paths that it leaves out; a value that was changed since stays as it is."""
    if isinstance(config, Mapping):
        return {name: with_local(item, paths, f"{prefix}{name}.") for name, item in config.items()}
    if isinstance(config, list):
        return [with_local(item, paths, f"{prefix}{place}.") for place, item in enumerate(config)]
    entry = paths.get(prefix.removesuffix("."))
    return entry["here"] if entry is not None and entry["shared"] == config else config


def told_apart(paths: Sequence[str]) -> dict[str, str]:
    """Texts for different paths, by path: short, and different. Folders of users stay out of them."""
    texts = {path: shareable_text(path) for path in dict.fromkeys(paths)}
    same: dict[str, list[str]] = {}
    for path, text in texts.items():
        same.setdefault(text, []).append(path)
    for text, group in same.items():
        if len(group) == 1:
            continue
        for depth in (2, 3, 4):
            longer = {path: "/".join(own_parts(path)[-depth:]) for path in group}
            if len(set(longer.values())) == len(group):
                texts.update({path: without_user(f".../{end}") for path, end in longer.items()})
                break
        else:
            texts.update({path: f"{text} ({number})" for number, path in enumerate(group, 1)})
    return texts


def without_homes(path: str, folder: str) -> str:
    """A path relative to a folder above it, without folders that name users."""
    relative, own = os.path.relpath(path, folder), os.path.join(*own_parts(path))
    return without_user(min(relative, own, key=len))


def different(texts: Sequence[str]) -> list[str]:
    """The texts, with a number after each that stands there more than once."""
    seen: dict[str, int] = {}
    found = []
    for text in texts:
        seen[text] = seen.get(text, 0) + 1
        found.append(f"{text} ({seen[text]})" if texts.count(text) > 1 else text)
    return found


def own_parts(path: str) -> tuple[str, ...]:
    """The parts of a path below anybody's home directory."""
    parts = PurePosixPath(os.path.expanduser(path)).parts[1:]
    if len(parts) > 2 and parts[0] in ("home", "Users"):
        return parts[2:]
    home = os.path.expanduser("~").rstrip(os.sep) + os.sep
    inside = os.path.expanduser(path)
    return PurePosixPath(inside.removeprefix(home)).parts if inside.startswith(home) else parts
