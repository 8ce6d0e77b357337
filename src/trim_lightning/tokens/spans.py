"""Find a record's own text in what a chat template renders from it.

A chat template is a program: it may add a system text, trim white space, refuse roles, move or drop parts.
Its literal text (the *scaffolding*) is learnt by rendering the same roles with unique sentinels for contents.
The contents of the real rendering are then fitted between, each as long as it can be, so that a content that
spells scaffolding cannot mislead. Which text counts as content is said in docs/method.md; how it is found is our
choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import NamedTuple

from trim_lightning.records.record import Turn

SCAFFOLD, PROMPT, RESPONSE = 0, 1, 2

JOINER = "\n\n"
"""Stands between turns that had to be merged into one message; it is scaffolding."""

_SENTINEL = "qzTRIM{}MIRTzq"
_SENTINEL_PATTERN = re.compile(r"qzTRIM(\d+)MIRTzq")
_MOST_TRIALS = 2000  # pieces tried beyond one per content before a record is given up


class Span(NamedTuple):
    """A range of a record's own characters.

    Attributes:
        start: First character.
        end: One past the last character.
        role: `PROMPT` or `RESPONSE`.
    """

    start: int
    end: int
    role: int


class RenderError(Exception):
    """This record cannot be rendered; the message says why. Such a record is counted and kept out."""


@dataclass(frozen=True, slots=True)
class Message:
    """What the chat template is given for one or, if it made us merge, several turns.

    Attributes:
        role: The role the template sees.
        content: The text the template sees.
        parts: Where each turn's own text lies in ``content``.
        thought: As of a `Turn`; likewise the others.
        calls: See thought.
        trained: See thought.
        name: See thought.
        call_id: See thought.
    """

    role: str
    content: str
    parts: tuple[Span, ...]
    thought: str = ""
    calls: str = ""
    trained: bool = True
    name: str = ""
    call_id: str = ""

    @property
    def plain(self) -> bool:
        """True if there is nothing but role and content."""
        return not (self.thought or self.calls or self.name or self.call_id)


class Kind(Enum):
    """What a template may treat differently about a content."""

    EMPTY = "empty"
    BLANK = "blank"  # white space only
    THINK = "think"  # with a closed thought, which templates drop from earlier turns
    TEXT = "text"


_PADDING = {  # what surrounds the sentinel, to see what the template trims or drops
    Kind.BLANK: (" \n", "\n "),
    Kind.TEXT: (" \n", "\n "),
    Kind.THINK: ("<think>\nthought\n</think>\n\n", "\n "),
}


@dataclass(frozen=True, slots=True)
class Scaffold:
    """A template's literal text for one sequence of roles.

    Attributes:
        segments: ``[slots + 1]`` literal texts: each but the last stands before its slot.
        slots: For each place where a content goes, the message it is from; a template may move or repeat one.
    """

    segments: tuple[str, ...]
    slots: tuple[int, ...]


def adaptations(turns: Sequence[Turn]) -> Iterator[tuple[Message, ...]]:
    """Yield a conversation as it is, then in forms that stricter templates accept.

    First tool turns become user turns, then system turns too; consecutive turns of one role are merged with a
    blank line between. So a system text ends up at the head of the first user turn. A form that changes
    nothing is left out.
    """
    messages = tuple(_message(turn) for turn in turns)
    yield messages
    steps: tuple[dict[str, str], ...] = ({"tool": "user"}, {"tool": "user", "system": "user"})
    for renamed in steps:
        adapted = _merged(messages, renamed)
        if adapted != messages:
            yield adapted
        messages = adapted


def _message(turn: Turn) -> Message:
    role = SCAFFOLD if not turn.trained else RESPONSE if turn.role == "assistant" else PROMPT
    parts = (Span(0, len(turn.content), role),) if turn.content else ()
    return Message(turn.role, turn.content, parts, turn.thought, turn.calls, turn.trained, turn.name, turn.call_id)


def _merged(messages: Sequence[Message], renamed: Mapping[str, str]) -> tuple[Message, ...]:
    merged = []
    alone = [place if message.thought or message.calls else -1 for place, message in enumerate(messages)]
    roles = [renamed.get(message.role, message.role) for message in messages]
    for (role, place), group in groupby(range(len(messages)), key=lambda place: (roles[place], alone[place])):
        run = [messages[number] for number in group]
        if place >= 0:
            merged += run
            continue
        pieces = [message for message in run if message.content]
        parts, start = [], 0
        for piece in pieces:
            parts += [Span(start + part.start, start + part.end, part.role) for part in piece.parts]
            start += len(piece.content) + len(JOINER)
        merged.append(Message(role, JOINER.join(piece.content for piece in pieces), tuple(parts)))
    return tuple(merged)


def readings(messages: Sequence[Message]) -> Iterator[tuple[Kind, ...]]:
    """Yield the kinds of the contents, then again with each blank one, at last all of them, taken for empty.

    The later readings serve templates where a trimmed blank lets the scaffolding around it be trimmed too.
    """
    kinds = tuple(_kind(message) for message in messages)
    yield kinds
    blank = [place for place, kind in enumerate(kinds) if kind is Kind.BLANK]
    choices = [{place} for place in blank]
    if len(blank) > 1:
        choices.append(set(blank))
    for emptied in choices:
        yield tuple(Kind.EMPTY if place in emptied else kind for place, kind in enumerate(kinds))


def _kind(message: Message) -> Kind:
    if not message.content:
        return Kind.EMPTY
    if message.content.isspace():
        return Kind.BLANK
    return Kind.THINK if "</think>" in message.content else Kind.TEXT


def probes(kinds: Sequence[Kind]) -> list[str]:
    """Return one content per message, to be rendered for `learn`: a sentinel unless the kind is empty."""
    contents = []
    for place, kind in enumerate(kinds):
        left, right = _PADDING.get(kind, ("", ""))
        contents.append("" if kind is Kind.EMPTY else left + _SENTINEL.format(place) + right)
    return contents


def learn(rendered: str, kinds: Sequence[Kind]) -> Scaffold:
    """Read the scaffolding off a rendering of `probes`.

    Raises:
        RenderError: if a message's sentinel is not in the rendering.
    """
    segments, slots, done = [], [], 0
    for match in _SENTINEL_PATTERN.finditer(rendered):
        (start, end), message = match.span(), int(match[1])
        left, right = _PADDING[kinds[message]]
        start -= len(left) * rendered.endswith(left, done, start)
        end += len(right) * rendered.startswith(right, end)
        segments.append(rendered[done:start])
        slots.append(message)
        done = end
    absent = {place for place, kind in enumerate(kinds) if kind is not Kind.EMPTY} - set(slots)
    if absent:
        raise RenderError(f"the chat template leaves out or rewrites the text of turn {min(absent) + 1}")
    return Scaffold((*segments, rendered[done:]), tuple(slots))


def locate(scaffold: Scaffold, text: str, messages: Sequence[Message]) -> tuple[Span, ...] | None:
    """Find the messages' contents in a rendering.

    Args:
        scaffold: What `learn` returned for the same roles and kinds.
        text: The rendering.
        messages: What was rendered.

    Returns:
        The character ranges of the turns' own texts in ``text``, in order and none of them empty, or None if
        ``text`` is not made of the scaffolding and the contents, each whole, trimmed, or cut to one piece.
    """
    head, *segments = scaffold.segments
    if not text.startswith(head):
        return None
    contents = [messages[message] for message in scaffold.slots]
    ranges = _fitted(text, len(head), segments, [message.content for message in contents])
    if ranges is None:
        return None
    fitted = zip(contents, ranges, strict=True)
    return tuple(span for message, (start, end) in fitted for span in own_text(message, text, start, end))


def _fitted(text: str, start: int, segments: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """Fit ``contents[i]``, or the longest piece of it that will do, before ``segments[i]``, after ``start``.

    Where a later content finds no place, the search goes back to the next shorter piece of the one before.
    """
    if not contents:
        return [] if start == len(text) else None
    final = len(contents) - 1
    starts = [start]
    searches = [_ends(text, start, contents[0], segments[0], last=final == 0)]
    ends: list[int] = []
    for _ in range(_MOST_TRIALS + len(contents)):
        end = next(searches[-1], None)
        if end is None:
            searches.pop()
            starts.pop()
            if not searches:
                return None
            ends.pop()
            continue
        ends.append(end)
        slot = len(ends)
        if slot > final:
            return list(zip(starts, ends, strict=True))
        starts.append(end + len(segments[slot - 1]))
        searches.append(_ends(text, starts[-1], contents[slot], segments[slot], last=slot == final))
    return None


def _ends(text: str, start: int, content: str, segment: str, *, last: bool) -> Iterator[int]:
    """Yield, longest first, the ends of pieces of ``content`` from ``start`` on that precede ``segment``."""
    if last:
        end = len(text) - len(segment)
        if end >= start and text.endswith(segment) and text[start:end] in content:
            yield end
        return
    end = min(start + len(content), len(text))
    while end >= start and (end := text.rfind(segment, start, end + len(segment))) >= 0:
        if text[start:end] in content:
            yield end
        end -= 1


def own_text(message: Message, text: str, start: int, end: int) -> Iterator[Span]:
    """Yield the message's parts that lie in ``text[start:end]``, which is a piece of its content."""
    source = message.content.find(text[start:end])
    shift = start - source
    for part in message.parts:
        low, high = max(part.start + shift, start), min(part.end + shift, end)
        if low < high and part.role != SCAFFOLD:
            yield Span(low, high, part.role)
