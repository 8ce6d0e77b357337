"""JSON files that somebody else may have written: bounded in size, and one kind of error for all that can be wrong."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_ESCAPED = re.compile(rb"\\u[dD][89a-fA-F]")  # half of a surrogate pair, be it a lone one
MOST_BYTES = 64 << 20
"""Largest manifest, receipt or config that is read; what the project writes stays far below (our choice)."""
MOST_NESTED = 200
"""Lists and objects within one another that are read (our choice): what the interpreter permits differs by version."""


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: if it is not JSON.
        ValueError: for an integer with more digits than the interpreter permits, and for more than `MOST_NESTED` lists
            and objects within one another.
    """
    try:
        value = json.loads(text)
        if text.count("[") + text.count("{") > MOST_NESTED and nested_too_deeply(value):
            raise RecursionError
    except RecursionError:  # the interpreter's, or ours
        raise ValueError("nested too deeply to read") from None
    return value


def nested_too_deeply(value: Any) -> bool:
    """True for more than `MOST_NESTED` lists and objects within one another."""
    level = [value]
    for _ in range(MOST_NESTED + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return False
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return True


def with_leaves(value: Any, change: Callable[[str, Any], Any], prefix: str = "") -> Any:
    """A JSON-like value whose leaves are what ``change`` gives for their dotted names and them; tuples become lists."""
    if isinstance(value, Mapping):
        return {key: with_leaves(item, change, f"{prefix}{key}.") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_leaves(item, change, f"{prefix}{place}.") for place, item in enumerate(value)]
    return change(prefix.removesuffix("."), value)


def dotted(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in nested mappings that is no mapping itself."""
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from dotted(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if it cannot be read.
        ValueError: if it is no regular file, too large, not UTF-8, not JSON, or JSON of another kind; the text says
            which, in a few words.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
    with path.open("rb") as file:
        return parse_json_object(file.read(MOST_BYTES + 1))


def parse_json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in some bytes; lone surrogates in it become U+FFFD.

    Raises:
        ValueError: if they are not UTF-8, not JSON, or JSON of another kind; the text says which, in a few words.
    """
    try:
        value = load_json(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at line {error.lineno})") from None
    except ValueError as error:
        # the interpreter's limit on the digits of an integer; its own hint is about code, not data
        raise ValueError(f"not valid JSON ({str(error).partition(':')[0]})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return _whole(value) if _ESCAPED.search(data) else value


def _whole(value: Any) -> Any:
    """A JSON value whose texts can be written as UTF-8: lone surrogates become U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole(name): _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value
