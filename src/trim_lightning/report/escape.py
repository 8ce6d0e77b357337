"""Text from data on its way into a page: it is shown, and never does anything."""

from __future__ import annotations

import json
import re
from typing import Any

from trim_lightning.console.visible import _UNSEEN

_UNSAFE = re.compile(f"[<{_UNSEEN}]")


def data_block(value: Any) -> str:
    """JSON for a ``<script type="application/json">`` block.

    No ``<`` stands in it, so that nothing can end the block or open a comment; control and direction characters are
    written as escapes. All other text stands as it is, so that the file can be searched.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(lambda found: _escape(ord(found.group())), text)


def _escape(code: int) -> str:
    if code > 0xFFFF:
        high, low = divmod(code - 0x10000, 0x400)
        return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
    return f"\\u{code:04x}"
