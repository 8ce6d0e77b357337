"""Conversations that are written out as one text."""

from __future__ import annotations

import re

from trim_lightning.records.messages import ROLES
from trim_lightning.records.record import Turn

# what Anthropic's hh-rlhf, Glaive's and the guanaco set put before each turn
_SPEAKERS = (
    re.compile(r"(?:\A\s*|\n\n+)((?i:Human|User|Assistant|System|Function response)):[ \t]?"),
    re.compile(r"\s*### ?(Human|User|Assistant|System):[ \t]?"),
)
_RENDERED = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant)\|>|\[/INST\]|"
    r"(?:\A|\n)(?:### ?(?:Instruction|Human|User)|User|Human):|\bUSER: .+\bASSISTANT: "
)


def spoken_turns(text: str) -> tuple[Turn, ...] | None:
    """The turns of a text that begins with a speaker's name and holds both sides; None for others.

    A last assistant turn without a text, which waits for the answer, is none.
    """
    for pattern in _SPEAKERS:
        marks = list(pattern.finditer(text))
        roles = [ROLES[mark[1].lower()] for mark in marks]
        if not {"user", "assistant"} <= set(roles) or marks[0].start() or roles[0] == "assistant":
            continue
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        said = [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
        turns = [Turn(role, content) for role, content in zip(roles, said, strict=True)]
        return tuple(turns if said[-1] or roles[-1] != "assistant" else turns[:-1])
    return None


def looks_rendered(text: str) -> bool:
    """True for a text in which the marks of a chat template stand."""
    return _RENDERED.search(text) is not None
