"""Rows of other formats as JSON lines."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

from trim_lightning.files.json_files import with_leaves

BATCH_ROWS = 1024


def json_line(row: Any) -> str:
    """A row as one line of JSON; what JSON has no type for becomes text, NaN and the infinities null."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_text)
    except ValueError:
        return json.dumps(with_leaves(row, _finite), ensure_ascii=False, allow_nan=False, default=_as_text)


def _as_text(value: Any) -> str:
    """What JSON has no type for: dates and decimals as ``str`` gives them, bytes as UTF-8 if they are."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return str(value)


def _finite(name: str, value: Any) -> Any:
    """NaN and the infinities as null: JSON does not have them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(error: BaseException) -> str:
    """The type and the first sentence or so of an exception, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
