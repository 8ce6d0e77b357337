"""Text from data on a terminal: invisible and control characters made visible."""

from __future__ import annotations

import re

# what a reader must see and a browser must not obey: controls, direction marks, characters without a shape, lone halves
# of surrogate pairs; not the joiner and the variation selectors that emoji are made of (U+200D, U+FE00 to U+FE0F)
_UNSEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200c\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff\ud800-\udfff"
)
_HIDDEN = re.compile(f"[{_UNSEEN}]")


def visible(text: str) -> str:
    """The text with control and direction characters written out, so that all of it can be seen.

    ``\\n`` and ``\\t`` stay. The others become their control picture (``␀``) or code point (``⟨U+202E⟩``).
    """
    return _HIDDEN.sub(lambda found: _picture(ord(found.group())), text)


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"
