"""Turn conversations into token ids and know of every token whose text it holds.

A token that holds any content character is content (docs/method.md). So a token that straddles a border,
white space mostly, such as one made of a record's last line break and the template's first, is content as a
whole; one that holds both prompt and response text takes the role of its first content character. What the
tokenizer inserts by itself (the dummy space that SentencePiece models put before a text) holds no character
and is scaffolding. Special tokens are scaffolding even where a record spells one out. How this is computed is
our choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from trim_lightning.errors import UserError
from trim_lightning.records.record import TOOLS, Turn
from trim_lightning.tokens import bounds
from trim_lightning.tokens.bounds import TooSlow, limited_time, refuse_bombs
from trim_lightning.tokens.parts import Found, Style, left_out, render_parts, styles, wrapped
from trim_lightning.tokens.spans import (
    PROMPT,
    RESPONSE,
    SCAFFOLD,
    Kind,
    RenderError,
    Scaffold,
    Span,
    adaptations,
    learn,
    locate,
    probes,
    readings,
)
from trim_lightning.tokens.token_roles import (
    _eos_to_append,
    _flat,
    _name,
    _one_line,
    _roles_of,
    _token_tables,
    _untrimmed_copy,
)

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from trim_lightning.tokens.spans import Message

__all__ = ["PROMPT", "RESPONSE", "SCAFFOLD", "ChatRenderer", "Encoded", "RenderError", "Rendered", "Span"]

RENDERING_VERSION = 2
"""Raise it when the same conversation would give other tokens or roles than before."""

DATE = "26 Jul 2024"
"""The day that every template is told it is, the date that Llama 3 templates fall back to."""

_DATE_PARTS = {
    "%d": "26",
    "%-d": "26",
    "%e": "26",
    "%b": "Jul",
    "%B": "July",
    "%m": "07",
    "%-m": "7",
    "%Y": "2024",
    "%y": "24",
    "%j": "208",
    "%a": "Fri",
    "%A": "Friday",
    "%F": "2024-07-26",
    "%D": "07/26/24",
    "%H": "00",
    "%I": "12",
    "%M": "00",
    "%S": "00",
    "%p": "AM",
    "%T": "00:00:00",
}
# transformers replaces functions among the render arguments, so the clock is overridden in the template's own
# language. The line break is the one that transformers' environment swallows after a block.
_STOPPED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DATE_PARTS.items())
    + " }}{% endmacro %}\n"
)

_MOST_SCAFFOLDS = 4096


@dataclass(frozen=True)
class Rendered:
    """One conversation as the model's text.

    Attributes:
        text: The whole text, scaffolding included.
        spans: Where the record's own characters are, in order; none is empty, no two overlap.
        dropped: Parts that the template does not render: thoughts, calls, tools.
    """

    text: str
    spans: tuple[Span, ...]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """One conversation as the model's tokens.

    Attributes:
        token_ids: int32 ``[tokens]``, scaffolding included.
        roles: uint8 ``[tokens]``, each `SCAFFOLD`, `PROMPT` or `RESPONSE`.
        truncated: True if tokens were cut off at the end.
        dropped: See `Rendered`.
    """

    token_ids: np.ndarray
    roles: np.ndarray
    truncated: bool
    dropped: tuple[str, ...] = ()


class ChatRenderer:
    """Renders and tokenises conversations.

    Changes made to the tokenizer after construction are not seen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        """Prepare a tokenizer.

        Args:
            tokenizer: A fast tokenizer.
            chat_template: The text of a Jinja chat template to use instead of the tokenizer's own.

        Raises:
            UserError: if the tokenizer cannot tell where its tokens lie, or the template is not valid.
        """
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {_name(tokenizer)}: it is not a fast one, so where its tokens lie is unknown; "
                "use a model with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._template = chat_template or own_template(tokenizer)
        self._scaffolds: dict[tuple[tuple[str, ...], tuple[Kind, ...]], Scaffold | str] = {}
        self._backend = _untrimmed_copy(tokenizer)
        self._is_special, self._is_space = _token_tables(tokenizer)
        self._eos = _eos_to_append(tokenizer, self._backend)
        self._jinja = with_stopped_clock(self._template or "")
        if self._template is not None:
            self._check_syntax()

    @property
    def identity(self) -> dict[str, Any]:
        """What, besides the tokenizer, decides the tokens and roles; JSON-able, for cache keys."""
        template = "plain" if self._template is None else hashlib.sha256(self._template.encode()).hexdigest()
        return {"chat_template": template, "date": DATE, "version": RENDERING_VERSION}

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Render a conversation and find its own text in the result.

        Where the template refuses or drops a system or tool role, or wants user and assistant to alternate,
        the conversation is adapted as `trim_lightning.tokens.spans.adaptations` describes. Without a template
        the contents are joined with line breaks (docs/method.md).

        Raises:
            RenderError: if the conversation is empty, if the template refuses it in every form or rewrites it
                so that its text cannot be found again, or if the text is not valid Unicode.
        """
        tools = next((turn.content for turn in turns if turn.role == TOOLS), "")
        turns = [turn for turn in turns if turn.role != TOOLS]
        if not turns:
            raise RenderError("the record has no turns")
        rendered = _render_plain(turns, tools) if self._template is None else self._render_with_template(turns, tools)
        try:
            rendered.text.encode()
        except UnicodeEncodeError:
            raise RenderError("the text holds half of a surrogate pair, which is not valid Unicode") from None
        return rendered

    def encode(self, conversations: Sequence[Sequence[Turn]], max_length: int) -> list[Encoded | RenderError]:
        """Render and tokenise conversations, with one tokenizer call for all of them; each is cut at ``max_length``.

        Returns:
            One item per conversation, in order: its tokens, or why it could not be rendered.
        """
        outcomes = [self._attempt(turns) for turns in conversations]
        rendered = [outcome for outcome in outcomes if isinstance(outcome, Rendered)]
        encodings = self._backend.encode_batch(
            [item.text for item in rendered], add_special_tokens=self._template is None
        )
        encoded = iter(self._with_roles(rendered, encodings, max_length))
        return [outcome if isinstance(outcome, RenderError) else next(encoded) for outcome in outcomes]

    def _attempt(self, turns: Sequence[Turn]) -> Rendered | RenderError:
        try:
            return self.render(turns)
        except RenderError as error:
            return error

    def _render_with_template(self, turns: Sequence[Turn], tools: str) -> Rendered:
        failures: list[RenderError] = []
        plain = not tools and all(turn.plain or not turn.trained for turn in turns)
        for messages in adaptations(turns):
            try:
                if plain and all(message.plain for message in messages):
                    return self._render_messages(messages)
                return self._render_parts(messages, tools)
            except RenderError as error:
                failures.append(error)
        for messages in adaptations(turns) if plain else ():
            try:
                return self._render_parts(messages, tools)
            except RenderError:
                continue
        raise failures[-1]

    def _render_parts(self, messages: Sequence[Message], tools: str) -> Rendered:
        """Render in the style that leaves out least; whatever was rendered before, as a record's text is its own."""
        given = wrapped(tools) if tools else []
        best: tuple[Found, Style] | None = None
        failure = RenderError("")
        for style in styles(messages, given):
            if best is not None and not style.as_good_as(best[1]):
                continue  # those are for templates that refuse the others
            try:
                found = render_parts(self._apply_parts, messages, given, style)
            except RenderError as error:
                failure = failure if str(failure) else error
                continue
            if best is None or len(found.dropped) < len(best[0].dropped):
                best = (found, style)
            if not found.dropped:
                break
        if best is None:
            raise failure
        return Rendered(best[0].text, best[0].spans, best[0].dropped)

    def _render_messages(self, messages: Sequence[Message]) -> Rendered:
        roles, text = tuple(message.role for message in messages), None
        for kinds in readings(messages):
            scaffold = self._scaffold(roles, kinds)
            if text is None:
                text = self._apply(roles, [message.content for message in messages])
            spans = locate(scaffold, text, messages)
            if spans is not None:
                return Rendered(text, spans, left_out(messages, text))
        raise RenderError("the chat template rewrites the text of the record, which cannot be found again")

    def _scaffold(self, roles: tuple[str, ...], kinds: tuple[Kind, ...]) -> Scaffold:
        known = self._scaffolds.get((roles, kinds))
        if known is None:
            try:
                known = learn(self._apply(roles, probes(kinds)), kinds)
            except RenderError as error:
                known = str(error)  # kept as text: a raised exception would hold on to its frames
            if len(self._scaffolds) >= _MOST_SCAFFOLDS:
                self._scaffolds.clear()
            self._scaffolds[roles, kinds] = known
        if isinstance(known, str):
            raise RenderError(known)
        return known

    def _apply(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        conversation = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        return self._apply_parts(conversation, None)

    def _apply_parts(self, conversation: list[dict[str, Any]], tools: list[Any] | None) -> str:
        try:
            with limited_time():
                text = self._tokenizer.apply_chat_template(
                    conversation,
                    chat_template=self._jinja,
                    tokenize=False,
                    add_generation_prompt=False,
                    date_string=DATE,
                    tools=tools,
                )
        except (ImportError, jinja2.TemplateSyntaxError):
            raise
        except TooSlow:
            raise UserError(
                f"chat template of {_name(self._tokenizer)}: takes more than {bounds.MOST_SECONDS} seconds "
                "for one record; correct it or set model.chat_template"
            ) from None
        except Exception as error:  # a template is foreign code and may raise anything
            raise RenderError(f"the chat template refuses the record: {_one_line(error)}") from None
        assert isinstance(text, str)
        return text

    def _check_syntax(self) -> None:
        try:
            refuse_bombs(self._jinja)
            self._apply(["user"], ["text"])
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"chat template of {_name(self._tokenizer)}, line {error.lineno}: {_one_line(error)}; "
                "correct it or set model.chat_template"
            ) from None
        except RenderError:
            pass  # it may want more than one turn

    def _with_roles(
        self, rendered: Sequence[Rendered], encodings: Sequence[Encoding], max_length: int
    ) -> list[Encoded]:
        """Give every token its role, for the whole batch at once: texts are laid end to end on one line."""
        if not rendered:
            return []
        lengths = np.array([len(encoding) for encoding in encodings])
        origins = np.cumsum([0] + [len(item.text) for item in rendered[:-1]])
        ids = np.fromiter(chain.from_iterable(item.ids for item in encodings), np.int32, lengths.sum())
        ranges = _flat([item.offsets for item in encodings], 2) + np.repeat(origins, lengths)[:, None]
        spans = _flat([item.spans for item in rendered], 3)
        spans[:, :2] += np.repeat(origins, [len(item.spans) for item in rendered])[:, None]
        roles = _roles_of(ranges, spans)
        roles[self._is_special[ids]] = SCAFFOLD
        # the dummy space is reported at the character after it, where the next token starts too
        shares_start = np.append(ranges[1:, 0] == ranges[:-1, 0], False)
        roles[self._is_space[ids] & shares_start] = SCAFFOLD
        cuts = np.cumsum(lengths)[:-1]
        parts = zip(np.split(ids, cuts), np.split(roles, cuts), rendered, strict=True)
        return [
            self._finished(token_ids, token_roles, max_length, item.dropped) for token_ids, token_roles, item in parts
        ]

    def _finished(self, token_ids: np.ndarray, roles: np.ndarray, max_length: int, dropped: tuple[str, ...]) -> Encoded:
        if self._template is None and self._eos is not None:
            token_ids = np.append(token_ids, np.int32(self._eos))
            roles = np.append(roles, np.uint8(SCAFFOLD))
        truncated = len(token_ids) > max_length
        # copies, so that a kept record does not keep its whole batch
        return Encoded(token_ids[:max_length].copy(), roles[:max_length].copy(), truncated, dropped)


def _render_plain(turns: Sequence[Turn], tools: str) -> Rendered:
    """All texts on lines of their own: tools, and of each turn thought, content and calls."""
    texts = [(tools, PROMPT)] if tools else []
    for turn in turns:
        role = SCAFFOLD if not turn.trained else RESPONSE if turn.role == "assistant" else PROMPT
        texts += [(text, role) for text in filter(None, (turn.thought,))]
        texts += [(text, role) for text in (turn.content, *filter(None, (turn.calls,)))]
    spans, start = [], 0
    for text, role in texts:
        if text and role != SCAFFOLD:
            spans.append(Span(start, start + len(text), role))
        start += len(text) + 1
    return Rendered("\n".join(text for text, _ in texts), tuple(spans))


def with_stopped_clock(template: str) -> str:
    """A chat template in which it is `DATE` for ever; to be rendered with ``date_string=DATE``."""
    return _STOPPED_CLOCK + template if "strftime_now" in template else template


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template of a tokenizer, None if it has none.

    Raises:
        UserError: if it has several and none of them is the default.
    """
    if not tokenizer.chat_template:
        return None
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"tokenizer {_name(tokenizer)}: it has several chat templates and no default one; "
            "set model.chat_template to a file with the one to use"
        ) from None
    return template
