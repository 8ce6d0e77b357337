"""The value objects that every source and layout is turned into."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool", "tools"]
NOTHING_MORE = ("", "", True, "", "")
TOOLS: Role = "tools"  # no message: the tools that a conversation may call, as JSON


class Turn(NamedTuple):
    """One message of a conversation: who speaks and what was said, untouched.

    Attributes:
        role: Who speaks; ``tools`` is the list of the tools that may be called, which stands first.
        content: What was said; of ``tools`` the list as JSON.
        thought: The reasoning that the record keeps beside the content.
        calls: The tools that the message calls, as JSON: a list in the form of OpenAI.
        trained: False for an assistant turn that the record keeps out of the loss: context that counts for nothing.
        name: Of the tool whose result a tool turn holds.
        call_id: Of the call that a tool turn answers.
    """

    role: Role
    content: str
    thought: str = ""
    calls: str = ""
    trained: bool = True
    name: str = ""
    call_id: str = ""

    @property
    def plain(self) -> bool:
        """True if there is nothing but role and content."""
        return self[2:] == NOTHING_MORE and self.role != TOOLS

    @property
    def text(self) -> str:
        """All that was said, thought and called, for methods that compare texts."""
        if not (self.thought or self.calls):
            return self.content
        return "\n".join(part for part in (self.thought, self.content, self.calls) if part)


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


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A conversation as ``role`` and ``content`` pairs, texts untouched, with whatever else a turn holds."""
    return [message_of(turn) for turn in turns if turn.role != TOOLS]


def message_of(turn: Turn) -> dict[str, Any]:
    """One message in the form that trainers and chat templates read."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.thought:
        message["reasoning_content"] = turn.thought
    if turn.calls:
        message["tool_calls"] = json.loads(turn.calls)
    if not turn.trained:
        message["train"] = False
    if turn.name:
        message["name"] = turn.name
    if turn.call_id:
        message["tool_call_id"] = turn.call_id
    return message


def conversation_of(turns: Sequence[Turn]) -> dict[str, Any]:
    """A conversation as an object with ``messages`` and, where it has some, ``tools``; it reads back as it was."""
    tools = [turn.content for turn in turns if turn.role == TOOLS]
    return {"messages": messages_of(turns), **({"tools": json.loads(tools[0])} if tools else {})}
