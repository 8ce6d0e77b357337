"""Messages as people write them: roles, contents and parts, calls, thoughts, masks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trim_lightning.records.calls import are_tools, call_of, calls_of, read_tools, tools_first
from trim_lightning.records.fields import LayoutError, as_list, kind_of, scalar_text
from trim_lightning.records.names import SYSTEMS, THOUGHT_KEYS, TOOL_FIELDS
from trim_lightning.records.record import Role, Turn

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "system_prompt": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "agent": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_results": "tool",
    "tool_output": "tool",
    "function_response": "tool",
    "function response": "tool",
    "function_result": "tool",
    "environment": "tool",
    "ipython": "tool",
}
ROLE_KEYS, CONTENT_KEYS = ("from", "role", "speaker", "author"), ("value", "content", "text", "message", "parts")
MASKS = ("weight", "train", "training", "trainable", "loss")
# what an assistant said in place of a content
ANSWER_KEYS = ("refusal", "function_calls")
PAIRS: tuple[tuple[str, str], ...] = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("human", "gpt"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
)
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_THOUGHT_PARTS = ("thinking", "reasoning", "thought")


def read_messages(value: Any, field: str) -> tuple[Turn, ...]:
    """The turns of a list of messages, of pairs, of alternating texts, or of JSON text that holds such a list.

    Raises:
        LayoutError: if it is none of that; ``field`` is what the message calls it.
    """
    if type(value) is list and value and (plain := _plain_messages(value)) is not None:
        return plain
    value = unfolded(value)
    if not isinstance(value, list):
        raise LayoutError(f"field {field} is {kind_of(value)}, not a list of messages")
    if not value:
        raise LayoutError(f"field {field} is an empty list")
    if len(value) > 1 and all(isinstance(item, str) for item in value):
        return tuple(Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(value))
    if (pairs := as_pairs(value)) is not None:
        return pairs
    turns: list[Turn] = []
    for message in value:
        turns += [turn for turn in beside(message) if turn not in turns]
        turns += read_message(message, field)
    return tools_first(turns)


def beside(message: Any) -> Iterator[Turn]:
    """The system text and the tools that some sets keep in a message or in a pair."""
    if not isinstance(message, Mapping):
        return
    for name in TOOL_FIELDS:
        if message.get(name) and are_tools(message[name]):
            yield from read_tools(message[name], name)
    for name in SYSTEMS:
        if isinstance(text := message.get(name), str) and text.strip() and text != message.get("content"):
            yield Turn("system", text)


def _plain_messages(value: list[Any]) -> tuple[Turn, ...] | None:
    """The turns of messages with a role and a text and no more, as nearly all are; None for others."""
    turns = []
    for message in value:
        if type(message) is not dict or len(message) != 2:
            return None
        name, text = message.get("role"), message.get("content")
        if name is None:
            name, text = message.get("from"), message.get("value")
        role = ROLES.get(name) if type(name) is str else None
        if role is None or type(text) is not str:
            return None
        turns.append(Turn(role, text))
    return tuple(turns)


def unfolded(value: Any) -> Any:
    """A list in place of the text that spells it, of an object of lists, and of one message alone."""
    value = as_list(value)
    return [value] if is_message(value) else value


def is_message(value: Any) -> bool:
    """True for an object with a role and a content."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(value.get(key), str) for key in ROLE_KEYS)
        and any(key in value for key in (*CONTENT_KEYS, *ANSWER_KEYS, "tool_calls", "function_call"))
    )


def is_conversation(value: Any) -> bool:
    """True for what `read_messages` takes for more than one text: messages, pairs, or JSON text of such."""
    value = unfolded(value)
    return (
        isinstance(value, list)
        and bool(value)
        and (all(is_message(item) for item in value) or as_pairs(value) is not None)
    )


def is_messages(value: Any) -> bool:
    """True for a list of objects with a role and a content, or JSON text of one."""
    value = unfolded(value)
    return isinstance(value, list) and bool(value) and all(is_message(item) for item in value)


def as_pairs(value: Sequence[Any]) -> tuple[Turn, ...] | None:
    """The turns of a list of [user, assistant] pairs, as lists or objects; None if it is none."""
    turns: list[Turn] = []
    for item in value:
        texts: list[Any] = []
        if isinstance(item, list | tuple):
            texts = list(item)
        elif isinstance(item, Mapping):
            texts = next(([item[one], item[two]] for one, two in PAIRS if _are_texts(item, one, two)), [])
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            return None
        if isinstance(item, Mapping):
            turns += [turn for turn in beside(item) if turn not in turns]
            if isinstance(item.get("instruction"), str) and isinstance(more := item.get("input"), str) and more:
                texts[0] = f"{texts[0]}\n{more}"
        thought = _thought(item) if isinstance(item, Mapping) else ""
        turns += [Turn("user", texts[0]), Turn("assistant", texts[1], thought)]
    return tools_first(turns)


def _are_texts(item: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(item.get(name), str) for name in names)


def _thought(message: Mapping[str, Any]) -> str:
    return next((text for key in THOUGHT_KEYS if isinstance(text := message.get(key), str) and text), "")


def read_message(message: Any, field: str) -> Iterator[Turn]:
    """Read one ``role``/``content`` or ``from``/``value`` message; tool results among its parts are turns before it.

    Raises:
        LayoutError: if it is none.
    """
    if not isinstance(message, Mapping):
        raise LayoutError(f"field {field} holds {kind_of(message)} where a message is due")
    role_key = next((key for key in ROLE_KEYS if message.get(key) is not None), "role")
    due = "value" if role_key == "from" else "content"
    content_key = next((key for key in (due, *CONTENT_KEYS) if message.get(key) is not None), due)
    name = message.get(role_key)
    if not isinstance(name, str):
        raise LayoutError(f"field {field} has a message without {role_key}")
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise LayoutError(f"field {field} has the unknown role {name!r} (known: {', '.join(ROLES)})")
    content, calls = message.get(content_key), calls_of(message)
    if len(message) == 2 and isinstance(content, str):  # nearly all messages
        yield Turn(role, content)
        return
    thought = _thought(message)
    said = next((text for key in ANSWER_KEYS if isinstance(text := message.get(key), str) and text.strip()), None)
    if content in (None, "") and said is not None and not calls:
        content = said
    elif isinstance(content, Mapping) and role == "tool" and "type" not in content:
        content = json.dumps(content, ensure_ascii=False)
    elif isinstance(content, Mapping) and {"type", "text"} & set(content):
        content = [content]
    if isinstance(content, list):
        parts = [_part(part, field) for part in content]
        results = [result for *_, result in parts if result is not None]
        yield from results
        if results and len(results) == len(parts):
            return
        thought = "\n\n".join([*([thought] if thought else []), *(more for _, more, _, _ in parts if more)])
        calls += [call for _, _, called, _ in parts for call in called]
        content = "".join(text for text, *_ in parts)
    elif content is None and (calls or thought or message.get("tool_calls") is not None):
        content = ""
    elif content is None and content_key not in message:
        raise LayoutError(f"field {field} has a message without {content_key}")
    elif not isinstance(content, str):
        raise LayoutError(f"field {field} has a message whose {content_key} is {kind_of(content)}, not text")
    yield Turn(
        role,
        content,
        thought if role == "assistant" else "",
        json.dumps(calls, ensure_ascii=False) if calls else "",
        not (role == "assistant" and masked(message)),
        _text_of(message.get("name")) if role == "tool" else "",
        _text_of(message.get("tool_call_id")) if role == "tool" else "",
    )


def masked(message: Mapping[str, Any]) -> bool:
    """True for a message that its record keeps out of the loss: ``weight: 0``, ``train: false`` and the like."""
    return any(weight_of(message.get(key)) == 0 for key in MASKS)


def weight_of(value: Any) -> float | None:
    """A mark of `MASKS` as a number, of text too (CSV); None for what is none."""
    if isinstance(value, str):
        value = {"false": 0, "true": 1}.get(value.strip().lower(), value)
        try:
            return float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, bool | int | float) else None


def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _part(part: Any, field: str) -> tuple[str, str, list[dict[str, Any]], Turn | None]:
    """Text, thought, calls and tool result of one part of a content."""
    if isinstance(part, str):
        return part, "", [], None
    kind = (part.get("type") or "text") if isinstance(part, Mapping) else kind_of(part)
    if isinstance(part, Mapping):
        if kind in _TEXT_PARTS:
            found = (part.get(key) for key in ("text", kind))
            if (text := next((text for text in found if isinstance(text, str)), None)) is not None:
                return text, "", [], None
        if kind in _THOUGHT_PARTS:
            thoughts = next((part[key] for key in (kind, "thinking", "text", "content") if part.get(key)), "")
            if isinstance(thoughts, list):
                thoughts = "".join(_part(piece, field)[0] for piece in thoughts)
            if isinstance(thoughts, str):
                return "", thoughts, [], None
        if kind in ("tool_use", "tool_call", "function_call") and isinstance(part.get("name"), str):
            given: Any = next((part[key] for key in ("input", "arguments") if part.get(key) is not None), {})
            return "", "", [call_of({**part, "arguments": given})], None
        if kind == "tool_result":
            inner = part.get("content") or ""
            text = inner if isinstance(inner, str) else "".join(_part(piece, field)[0] for piece in inner)
            return "", "", [], Turn("tool", text, call_id=_text_of(part.get("tool_use_id")))
        kind = part.get("type", "unknown")
    raise LayoutError(f"field {field} has a content part of type {scalar_text(kind)}; only text can be read")


def read_history(value: Any, field: str) -> tuple[Turn, ...]:
    """The earlier turns of a conversation: [user, assistant] pairs or messages.

    Raises:
        LayoutError: if it is neither.
    """
    if value is None or value in ("", [], {}):
        return ()
    found = unfolded(value)
    if not isinstance(found, list):
        raise LayoutError(f"field {field} is {kind_of(value)}, not a list of [user, assistant] pairs")
    pairs = as_pairs(found)
    if pairs is None and not is_conversation(found):
        raise LayoutError(f"field {field} holds something other than [user, assistant] pairs of text")
    return read_messages(found, field) if pairs is None else pairs
