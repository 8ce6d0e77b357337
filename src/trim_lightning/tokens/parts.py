"""Render conversations with thoughts, calls and tools, and find each part of them in the result.

Every text is replaced by a sentinel, which shows the template's own literal text; the texts are then looked for between
it, one after the other. White space at their borders may differ: templates move thoughts and even out line breaks. What
a template renders for the calls of a message is what differs from the same rendering without them; tools are found by
their JSON, or by the texts in it. How this is computed is our choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from trim_lightning.tokens.spans import PROMPT, RESPONSE, SCAFFOLD, Message, RenderError, Span, own_text

Apply = Callable[[list[dict[str, Any]], list[Any] | None], str]
"""Renders messages and tools with the chat template."""

THOUGHTS, CALLS, TOOLS = "thoughts", "calls", "tools"
_SENTINEL = "qzTRIM{}MIRTzq"
_SENTINEL_PATTERN = re.compile(r"qzTRIM(\d+)MIRTzq")
_OPEN, _CLOSE = "<think>", "</think>"
_NO_CALL = {"qzNONEzq": "qzNONEzq"}


@dataclass(frozen=True)
class Style:
    """How a template wants what is no plain text.

    Attributes:
        listed: Contents as a list of parts.
        thought: The field of a message that holds its thought.
        as_text: Arguments of calls as JSON text.
        numbered: Calls and results with ids of nine letters, which some templates insist on.
        with_tools: The tools are handed over.
        whole: A thought in a content is not looked for apart from the answer.
    """

    listed: bool = False
    thought: str = "reasoning_content"
    as_text: bool = False
    numbered: bool = False
    with_tools: bool = True
    whole: bool = False

    def as_good_as(self, other: Style) -> bool:
        """True if they differ at most in how thoughts, arguments and tools are handed over."""
        return (self.listed, self.numbered, self.whole) == (other.listed, other.numbered, other.whole)


@dataclass(frozen=True)
class Found:
    """A rendering, the texts found in it, and which parts the template leaves out."""

    text: str
    spans: tuple[Span, ...]
    dropped: tuple[str, ...]


def styles(messages: Sequence[Message], tools: Sequence[Any]) -> Iterator[Style]:
    """The styles that may make a difference, the usual one first."""
    thoughts = ("reasoning_content", "thinking", "reasoning") if any(m.thought for m in messages) else ("",)
    calls = any(message.calls for message in messages)
    thinks = any(_CLOSE in message.content for message in messages)
    for whole, with_tools in product((False, True) if thinks else (False,), (True, False) if tools else (True,)):
        for listed in (False, True):
            for numbered in (False, True) if calls else (False,):
                for as_text in (False, True) if calls else (False,):
                    for thought in thoughts:
                        yield Style(listed, thought, as_text, numbered, with_tools, whole)


def render_parts(apply: Apply, messages: Sequence[Message], tools: Sequence[Any], style: Style) -> Found:
    """Render a conversation in one style.

    Raises:
        RenderError: if the template refuses it, or a content cannot be found again.
    """
    given = list(tools) if tools and style.with_tools else None
    pieces: dict[int, str] = {}
    for place, message in enumerate(messages):
        thought, answer = (message.thought, message.content) if style.whole else pieces_of(message)
        pieces |= {2 * place: answer, 2 * place + 1: thought}
    holes = [_probe(message, place, pieces) for place, message in enumerate(messages)]
    probed = apply([_as_dict(message, style) for message in holes], given)
    if style.listed and "'type': 'text'" in probed:
        raise RenderError("the chat template prints the list of a message's parts")
    segments, slots = _cut(probed)
    for place, message in enumerate(messages):
        if pieces[2 * place].strip() and 2 * place not in slots and _words(message):
            raise RenderError(f"the chat template leaves out or rewrites the text of turn {place + 1}")
    text = apply([_as_dict(message, style) for message in messages], given)
    placed = _fit(text, segments, [pieces[slot] for slot in slots], exact=True)
    placed = placed or _fit(text, segments, [pieces[slot] for slot in slots], exact=False)
    if placed is None:
        raise RenderError("the chat template rewrites the text of the record, which cannot be found again")
    spans, dropped = [], []
    for slot, (start, end) in zip(slots, placed.ranges, strict=True):
        message = messages[slot // 2]
        if slot % 2 and message.thought:
            spans.append(Span(start, end, RESPONSE if message.trained else SCAFFOLD))
        else:
            spans += own_text(message, text, start, end)
    if any(pieces[2 * place + 1] and 2 * place + 1 not in slots for place in range(len(messages))):
        dropped.append(THOUGHTS)
    places = _Places(segments, slots, placed.starts)
    for place, message in enumerate(messages):
        if message.calls:
            region = _calls(apply, holes, place, style, given, probed)
            if region is None:
                dropped.append(CALLS)
            elif message.trained:
                spans += places.spans(*region, RESPONSE)
    if tools:
        found = [] if given is None else _tools(apply, holes, style, given, probed)
        spans += [span for start, end in found for span in places.spans(start, end, PROMPT)]
        if not found:
            dropped.append(TOOLS)
    return Found(text, _in_order(spans), tuple(dict.fromkeys(dropped)))


def pieces_of(message: Message) -> tuple[str, str]:
    """The thought and the answer of a message, apart; no thought where there is none."""
    if message.thought or message.content.count(_CLOSE) != 1 or message.role != "assistant":
        return message.thought, message.content
    before, _, answer = message.content.partition(_CLOSE)
    head, opened, thought = before.rpartition(_OPEN)
    if opened and head.strip():
        return "", message.content
    return thought.strip(), answer.strip()


def left_out(messages: Sequence[Message], text: str) -> tuple[str, ...]:
    """That thoughts are missing, where a rendering lacks one that stands in a content."""
    contents = (message.content.strip() for message in messages if _CLOSE in message.content)
    return (THOUGHTS,) if any(content not in text for content in contents) else ()


def _words(message: Message) -> bool:
    return bool(message.content.strip())


def _probe(message: Message, place: int, pieces: Mapping[int, str]) -> Message:
    """The message with sentinels for its texts; a text that is empty or blank stays out."""
    thought, answer = pieces[2 * place + 1], pieces[2 * place]
    hole = _SENTINEL.format(2 * place) if answer.strip() else ""
    if thought.strip() and not message.thought:
        hole = f"{_OPEN}\n{_SENTINEL.format(2 * place + 1)}\n{_CLOSE}\n\n{hole}"
    elif not message.thought and answer != message.content:
        hole = f"{_OPEN}\n\n{_CLOSE}\n\n{hole}"  # a thought of nothing
    return replace(message, content=hole, thought=_SENTINEL.format(2 * place + 1) if message.thought else "")


def _as_dict(message: Message, style: Style) -> dict[str, Any]:
    content: Any = message.content
    if style.listed:
        content = [{"type": "text", "text": content}]
    made: dict[str, Any] = {"role": message.role, "content": content}
    if message.thought:
        made[style.thought] = message.thought
    if message.calls:
        made["tool_calls"] = [_call(call, place, style) for place, call in enumerate(json.loads(message.calls))]
    if message.role == "tool":
        made |= {key: value for key, value in (("name", message.name), ("tool_call_id", message.call_id)) if value}
        if style.numbered:
            made["tool_call_id"] = "call00000"
    return made


def _call(call: dict[str, Any], place: int, style: Style) -> dict[str, Any]:
    function = dict(call["function"])
    if style.as_text and not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, **({"id": f"call{place:05}"} if style.numbered else {}), "function": function}


def _cut(probed: str) -> tuple[list[str], list[int]]:
    segments, slots, done = [], [], 0
    for match in _SENTINEL_PATTERN.finditer(probed):
        segments.append(probed[done : match.start()])
        slots.append(int(match[1]))
        done = match.end()
    return [*segments, probed[done:]], slots


@dataclass(frozen=True)
class _Fitted:
    ranges: list[tuple[int, int]]  # of the pieces
    starts: list[int]  # of the segments


def _fit(text: str, segments: Sequence[str], pieces: Sequence[str], *, exact: bool) -> _Fitted | None:
    """Where segments and pieces, in turn, are in a text; white space at the pieces' borders is free unless exact."""
    ranges: list[tuple[int, int]] = []
    starts: list[int] = []
    at = 0
    for place, segment in enumerate(segments):
        last = place == len(segments) - 1
        core = segment
        if not exact:
            core = segment.lstrip() if place else segment
            core = core if last else core.rstrip()
            if place:
                at = _after_space(text, at)
        if not text.startswith(core, at):
            return None
        starts.append(at - (len(segment) - len(segment.lstrip()) if not exact and place else 0))
        at += len(core)
        if last:
            rest = text[at:]
            return _Fitted(ranges, starts) if not (rest if exact else rest.strip()) else None
        piece = pieces[place] if exact else pieces[place].strip()
        if not exact:
            at = _after_space(text, at)
        if not text.startswith(piece, at):
            return None
        ranges.append((at, at + len(piece)))
        at += len(piece)
    return None


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


class _Places:
    """From places in the rendering of sentinels to those in the real one."""

    def __init__(self, segments: Sequence[str], slots: Sequence[int], starts: Sequence[int]) -> None:
        self._segments, self._starts = segments, starts
        self._widths = [*(len(_SENTINEL.format(slot)) for slot in slots), 0]

    def spans(self, start: int, end: int, role: int) -> Iterator[Span]:
        """The pieces of a range that are the template's literal text, without blanks at their ends."""
        at = 0
        for segment, real, width in zip(self._segments, self._starts, self._widths, strict=True):
            low, high = max(start - at, 0), min(end - at, len(segment))
            if low < high and (inner := segment[low:high]).strip():
                low += len(inner) - len(inner.lstrip())
                high -= len(inner) - len(inner.rstrip())
                yield Span(real + low, real + high, role)
            at += len(segment) + width


def _difference(one: str, other: str) -> tuple[int, int]:
    """The range of a text that another one lacks: between what their ends and their beginnings share."""
    shorter, tail = min(len(one), len(other)), 0
    while tail < shorter and one[-1 - tail] == other[-1 - tail]:
        tail += 1
    head = 0
    while head < shorter - tail and one[head] == other[head]:
        head += 1
    return head, len(one) - tail


def _calls(
    apply: Apply, holes: Sequence[Message], place: int, style: Style, given: list[Any] | None, probed: str
) -> tuple[int, int] | None:
    """The range that a template renders for the calls of a message; None if it renders none of them."""
    calls = json.loads(holes[place].calls)
    others = [{**call, "function": {"name": "qzNONEzq", "arguments": _NO_CALL}} for call in calls]
    for instead in ("", json.dumps(others)):
        changed = [*holes[:place], replace(holes[place], calls=instead), *holes[place + 1 :]]
        try:
            without = apply([_as_dict(message, style) for message in changed], given)
        except RenderError:
            continue
        start, end = _difference(probed, without)
        if any(_is_printed(call["function"]["arguments"], probed[start:end]) for call in calls) and not style.as_text:
            raise RenderError("the chat template prints the arguments of a call as Python does")
        if all(call["function"]["name"] in probed[start:end] for call in calls):
            return _own_range(probed, start, end, place, calls)
        if start == end:
            return None
    return None


def _own_range(probed: str, start: int, end: int, place: int, calls: Sequence[Any]) -> tuple[int, int]:
    """The range of a message's calls; from the first name to the last argument where results hang on it, too."""
    others = (match for match in _SENTINEL_PATTERN.finditer(probed, start, end) if int(match[1]) // 2 != place)
    border = next((match.start() for match in others), None)
    if border is None:
        return start, end
    start = at = probed.find(calls[0]["function"]["name"], start, border)
    for call in calls:
        for leaf in (call["function"]["name"], *_leaves(call["function"]["arguments"])):
            found = probed.find(leaf, at, border)
            at = found + len(leaf) if found >= 0 else at
    return start, at


def _is_printed(arguments: Any, text: str) -> bool:
    """True if a text has an object as Python prints it, and not as JSON."""
    printed = str(arguments)
    return isinstance(arguments, Mapping) and bool(arguments) and printed in text and json.dumps(arguments) != printed


def _tools(
    apply: Apply, holes: Sequence[Message], style: Style, given: list[Any], probed: str
) -> list[tuple[int, int]]:
    """The ranges of the tools' own JSON, or of the texts in it."""
    try:
        start, end = _difference(probed, apply([_as_dict(message, style) for message in holes], None))
    except RenderError:
        start, end = 0, len(probed)
    ranges, at = [], start
    for tool in given:
        inner = tool.get("function", tool)
        forms = [json.dumps(item, ensure_ascii=False, indent=n) for item in (tool, inner) for n in (None, 4, 2)]
        forms += [json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in (tool, inner)]
        whole = next((form for form in forms if (probed.find(form, start, end)) >= 0), None)
        if whole is not None:
            at = probed.find(whole, start, end)
            ranges.append((at, at + len(whole)))
            continue
        name = str(inner.get("name", ""))
        at = probed.find(name, start, end) if name else -1
        if at < 0:
            return []
        ranges.append((at, at + len(name)))
        at += len(name)
        for leaf in _leaves({key: value for key, value in inner.items() if key != "name"}):
            found = probed.find(leaf, at, end)
            if found >= 0:
                ranges.append((found, found + len(leaf)))
                at = found + len(leaf)
    return ranges


def _leaves(value: Any) -> Iterator[str]:
    """Texts and numbers in a tool or in the arguments of a call, the names of parameters among them."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, Mapping) and key not in ("parameters", "properties"):
                yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _in_order(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Spans by place, none empty, none in another, none that counts for nothing."""
    kept: list[Span] = []
    for span in sorted(span for span in spans if span.start < span.end):
        start = max(span.start, kept[-1].end if kept else 0)
        if start < span.end:
            kept.append(Span(start, span.end, span.role))
    return tuple(span for span in kept if span.role != SCAFFOLD)


def wrapped(tools: str) -> list[Any]:
    """The tools as templates expect them: functions in objects of that type."""
    return [
        {"type": "function", "function": tool} if "function" not in tool and "name" in tool else tool
        for tool in json.loads(tools)
    ]
