"""Text from data on its way into a page: it is shown, and never does anything."""

from __future__ import annotations

import json
import re
from typing import Any

# what a reader must see and a browser must not obey: controls, direction marks, characters without a shape, lone halves
# of surrogate pairs; not the joiner and the variation selectors that emoji are made of (U+200D, U+FE00 to U+FE0F)
_UNSEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200c\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff\ud800-\udfff"
)
_HIDDEN = re.compile(f"[{_UNSEEN}]")
_UNSAFE = re.compile(f"[<{_UNSEEN}]")


def visible(text: str) -> str:
    """The text with control and direction characters written out, so that all of it can be seen.

    ``\\n`` and ``\\t`` stay. The others become their control picture (``␀``) or code point (``⟨U+202E⟩``).
    """
    return _HIDDEN.sub(lambda found: _picture(ord(found.group())), text)


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


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
