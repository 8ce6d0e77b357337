"""The value objects that every source and layout is turned into."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation: who speaks and what was said, untouched."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction-tuning example.

    Attributes:
        id: The value of the id field as text, or the record's 0-based line in its input.
        turns: The conversation in order. System, user and tool turns are the prompt, assistant turns the
            response.
    """

    id: str
    turns: tuple[Turn, ...]


def messages_of(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """A conversation as ``role`` and ``content`` pairs, texts untouched."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]
