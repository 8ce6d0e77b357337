"""Thoughts, calls, tools and masks under templates of several kinds: scoped tokens are the record's own text."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from templates import CHATML, QWEN3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trim_lightning.errors import UserError
from trim_lightning.records.record import Turn
from trim_lightning.tokens.rendering import PROMPT, RESPONSE, ChatRenderer, Encoded, RenderError

CALLS = json.dumps([{"type": "function", "function": {"name": "look", "arguments": {"at": "oak", "n": 2}}}])
TOOLS = json.dumps([{"type": "function", "function": {"name": "look", "description": "Looks at trees"}}])
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}"
KNOWS_ALL = (
    "{% if tools %}<|im_start|>system\nTools:\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}"
    + HEAD
    + "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content.strip() }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<call>{{ c.function | tojson }}</call>{% endfor %}" + TAIL
)
TEXT_ARGUMENTS = (
    HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '[' + c.function.name + ':' + c.function.arguments + ']' }}{% endfor %}" + TAIL
)
OTHER_THOUGHT = HEAD + "{% if m.thinking %}[[{{ m.thinking }}]]{% endif %}{{ m.content | trim }}" + TAIL
PARTS_ONLY = (
    HEAD + "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}" + TAIL
)
UNPACKS = (
    "{% macro turn(a, b) %}<{{ a }}>{{ b }}{% endmacro %}"
    "{% for m in messages %}{{ turn(**{'a': m.role, 'b': m.content}) }}{% endfor %}"
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that a role is a matter of single letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<|im_end|>")


def encode(template: str | None, *turns: Turn) -> Encoded:
    (encoded,) = ChatRenderer(tokenizer(), template).encode([turns], 4096)
    assert isinstance(encoded, Encoded), encoded
    return encoded


def scoped(encoded: Encoded) -> list[tuple[int, str]]:
    """Runs of tokens with one role, decoded."""
    runs = []
    borders = np.flatnonzero(np.diff(encoded.roles)) + 1
    for part in np.split(np.arange(len(encoded.roles)), borders):
        if encoded.roles[part[0]]:
            runs.append((int(encoded.roles[part[0]]), tokenizer().decode(encoded.token_ids[part].tolist())))
    return runs


ASKED, SAID = Turn("user", "What is it?"), Turn("assistant", "An oak.")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>\nOne.\n</think>\n\nTwo", ["<think>\nOne.\n</think>\n\nTwo"]),
        ("<think>One.</think>Two", ["One.", "Two"]),
        ("<think>\nOne.\n</think>\nTwo", ["One.", "Two"]),
        ("One.\n</think>\n\nTwo", ["One.", "Two"]),
        ("<think>\nOne.</think>\n<answer>2</answer>", ["One.", "<answer>2</answer>"]),
        ("<think>\n\nOne.\n\n</think>\n\n\nTwo", ["One.", "Two"]),
    ],
)
def test_thought_and_answer_are_both_found_whatever_the_spacing(content: str, expected: list[str]) -> None:
    once = encode(QWEN3, ASKED, Turn("assistant", content))
    assert scoped(once) == [(PROMPT, "What is it?"), *((RESPONSE, text) for text in expected)]
    assert once.dropped == ()
    earlier = encode(QWEN3, ASKED, Turn("assistant", content.replace("One", "Zero")), ASKED, Turn("assistant", content))
    assert earlier.dropped == ("thoughts",)
    assert scoped(earlier)[-len(expected) :] == [(RESPONSE, text) for text in expected]


def test_a_thought_apart_is_rendered_by_the_field_that_the_template_knows() -> None:
    turns = (ASKED, Turn("assistant", "An oak.", thought="Acorns."))
    for template in (KNOWS_ALL, OTHER_THOUGHT, None):
        encoded = encode(template, *turns)
        assert scoped(encoded)[1:] in ([(2, "Acorns."), (2, "An oak.")], [(2, "Acorns.\n"), (2, "An oak.")])
        assert encoded.dropped == ()
    encoded = encode(CHATML, *turns)
    assert (scoped(encoded)[1:], encoded.dropped) == ([(RESPONSE, "An oak.")], ("thoughts",))


def test_calls_and_tools_are_response_and_prompt() -> None:
    turns = (Turn("tools", TOOLS), ASKED, Turn("assistant", "", calls=CALLS), Turn("tool", "acorns", name="look"), SAID)
    encoded = encode(KNOWS_ALL, *turns)
    call = json.dumps(json.loads(CALLS)[0]["function"])
    assert scoped(encoded) == [
        (PROMPT, TOOLS[1:-1]),
        (PROMPT, "What is it?"),
        (RESPONSE, f"<call>{call}</call>"),
        (PROMPT, "acorns"),
        (RESPONSE, "An oak."),
    ]
    assert encoded.dropped == ()
    as_text = encode(TEXT_ARGUMENTS, *turns)
    assert as_text.dropped == ("tools",)
    assert (RESPONSE, '[look:{"at": "oak", "n": 2}]') in scoped(as_text)
    assert encode(CHATML, *turns).dropped == ("calls", "tools")


def test_masked_turns_count_for_nothing() -> None:
    masked = Turn("assistant", "A stone.", thought="Grey.", calls=CALLS, trained=False)
    for template in (CHATML, KNOWS_ALL, None):
        encoded = encode(template, ASKED, masked, ASKED, SAID)
        assert [text.strip() for role, text in scoped(encoded) if role == RESPONSE] == ["An oak."]
        assert "A stone." in tokenizer().decode(encoded.token_ids.tolist())


def test_templates_that_take_parts_only_get_parts() -> None:
    assert scoped(encode(PARTS_ONLY, ASKED, SAID)) == [(PROMPT, "What is it?"), (RESPONSE, "An oak.")]


def test_stars_may_unpack_but_not_raise_to_a_power() -> None:
    assert scoped(encode(UNPACKS, ASKED, SAID)) == [(PROMPT, "What is it?"), (RESPONSE, "An oak.")]
    with pytest.raises(UserError, match="power"):
        ChatRenderer(tokenizer(), "{{ 9 ** 9 }}")


def test_a_template_that_refuses_says_why() -> None:
    (outcome,) = ChatRenderer(tokenizer(), "{{ raise_exception('no oaks') }}").encode([[ASKED]], 64)
    assert isinstance(outcome, RenderError)
    assert "no oaks" in str(outcome)


def test_a_list_of_parts_is_never_printed() -> None:
    wrong = HEAD + "{{ m.content | upper if m.content is string else m.content }}" + TAIL
    (outcome,) = ChatRenderer(tokenizer(), wrong).encode([[ASKED, SAID]], 512)
    assert isinstance(outcome, RenderError)
