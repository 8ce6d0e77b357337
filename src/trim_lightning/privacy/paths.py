"""What may leave this machine: keys never, paths only by name.

Two kinds of files are told apart. What is meant to be shown to others (manifest, pages, exports, what a tracker
gets) goes through `shareable`. What stays here (the log, Hydra's own record, messages on the terminal) keeps its
paths, and goes through `hide_keys`. The paths that a manifest leaves out stay beside it in ``local.json``, where
``trim-explain`` and ``trim-compare`` look them up.
"""

from __future__ import annotations

import functools
import getpass
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from trim_lightning.files.json_files import with_leaves
from trim_lightning.privacy.keys import hide_keys

# a slash that begins a path of at least two parts: not that of an address, a fraction, or a word/word
PART = r"[^\s/'\",;:=\[\]{}()<>|]+"
ABSOLUTE = re.compile(rf"(?<![\w.~:/*-])(?:file://)?/(?:{PART}/)+(?:{PART})?")


def shareable(value: Any) -> Any:
    """Hide keys, this machine's paths and the user's name in every text of a JSON-like value.

    A path below the working directory is written relative to it, any other as ``.../name``.
    """
    return with_leaves(value, lambda _, leaf: shareable_text(leaf) if isinstance(leaf, str) else leaf)


def shareable_text(text: str) -> str:
    """The same for one text, which may be a path as a whole or hold some."""
    text = hide_keys(text)
    if is_path(text):
        return short(text)
    if "/" in text and "\n" not in text and os.path.exists(text):  # a relative path, not the id of a model on the Hub
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
    path, home = os.path.expanduser(path), os.path.expanduser("~").rstrip(os.sep) + os.sep
    parts = PurePosixPath(path).parts[1:]
    if len(parts) > 2 and parts[0] in ("home", "Users"):
        return parts[2:]
    return PurePosixPath(path.removeprefix(home)).parts if path.startswith(home) else parts
