"""Chat rendering and the roles of tokens, checked against plain-Python oracles that never use offsets."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from templates import CHATML, CONTROL_TOKENS, GEMMA, LLAMA2, LLAMA3, MISTRAL, QWEN3, STYLES, Chunks
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from trim_lightning.errors import UserError
from trim_lightning.records.record import Turn
from trim_lightning.tokens.rendering import (
    PROMPT,
    RESPONSE,
    SCAFFOLD,
    ChatRenderer,
    Encoded,
    Rendered,
    RenderError,
    Span,
)
from trim_lightning.tokens.token_roles import _roles_of

SENTENCES = [
    "What is the capital of France?\n\nThe capital of France is Paris.",
    "user asks, assistant answers; the system listens.  Two  spaces   and three.",
    "    def add(a, b):\n        return a + b\n\n\nprint(add(1, 2))",
    "[INST] Count from 1 to 10 [/INST] model 1 2 3 4 5 6 7 8 9 10",
] * 3
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


# --- small tokenizers ---------------------------------------------------------------------------------------


def _byte_level(trim: bool, prefix: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim)])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _with_byte_fallback(tokenizer: Tokenizer) -> Tokenizer:
    """Add the 256 byte tokens to the vocabulary proper, as SentencePiece models have them."""
    config = json.loads(tokenizer.to_str())
    model = config["model"]
    if model["type"] == "BPE":
        model["vocab"] |= {token: len(model["vocab"]) + byte for byte, token in enumerate(BYTE_TOKENS)}
        model["fuse_unk"] = True
    else:
        model["vocab"] += [[token, -30.0] for token in BYTE_TOKENS]
    model["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(config))


def _metaspace_bpe(legacy: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if legacy:  # as in Llama 2: the dummy space is put before every piece between special tokens
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *CONTROL_TOKENS], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _with_byte_fallback(tokenizer)


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", *CONTROL_TOKENS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _with_byte_fallback(tokenizer)


ENGINES = {
    "byte_trim": lambda: _byte_level(trim=True),
    "byte_exact": lambda: _byte_level(trim=False),
    "byte_prefix": lambda: _byte_level(trim=True, prefix=True),
    "bpe_legacy": lambda: _metaspace_bpe(legacy=True),
    "bpe_first": lambda: _metaspace_bpe(legacy=False),
    "unigram": _unigram,
}


@functools.cache
def tokenizer_of(engine: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=ENGINES[engine](),
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=CONTROL_TOKENS[2:],
    )


@functools.cache
def renderer_of(engine: str, template: str | None) -> ChatRenderer:
    return ChatRenderer(tokenizer_of(engine), template)


# --- oracles ------------------------------------------------------------------------------------------------


def turns_of(*pairs: tuple[str, str]) -> list[Turn]:
    return [Turn(role, text) for role, text in pairs]


def text_of(chunks: Chunks) -> str:
    return "".join(text for _, text in chunks)


def spans_of(chunks: Chunks) -> tuple[Span, ...]:
    spans, start = [], 0
    for who, text in chunks:
        if who and text:
            spans.append(Span(start, start + len(text), who))
        start += len(text)
    return tuple(spans)


def own_texts(rendered: Rendered) -> list[tuple[int, str]]:
    return [(span.role, rendered.text[span.start : span.end]) for span in rendered.spans]


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, other bytes for what follows U+00FF."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def bytes_of(token: str, engine: str) -> bytes:
    if token in CONTROL_TOKENS:
        return token.encode()
    if engine.startswith("byte"):
        return bytes(_byte_of_letter()[letter] for letter in token)
    return bytes([int(token[3:5], 16)]) if token in BYTE_TOKENS else token.replace("▁", " ").encode()


def expected_roles(tokens: list[str], engine: str, chunks: Chunks) -> list[int]:
    """Walk the tokens' own bytes along the text's bytes. Uses no offsets.

    Before a piece between special tokens the tokenizer may have put a space; it is then a byte too long.
    """
    owners = [who for who, text in chunks for _ in text.encode()]
    line = text_of(chunks).replace("▁", " ").encode() if not engine.startswith("byte") else text_of(chunks).encode()
    if "▁" in text_of(chunks) and not engine.startswith("byte"):
        raise ValueError("the oracle cannot tell that character from a space")
    roles, at, index = [], 0, 0
    while index < len(tokens):
        if tokens[index] in CONTROL_TOKENS:
            assert line.startswith(tokens[index].encode(), at)
            at += len(tokens[index].encode())
            roles.append(SCAFFOLD)
            index += 1
            continue
        stop = next((i for i in range(index, len(tokens)) if tokens[i] in CONTROL_TOKENS), len(tokens))
        piece = [bytes_of(token, engine) for token in tokens[index:stop]]
        whole = b"".join(piece)
        dummy = not line.startswith(whole, at) or (
            stop < len(tokens) and not line.startswith(tokens[stop].encode(), at + len(whole))
        )
        dummy = dummy or (stop == len(tokens) and at + len(whole) != len(line))
        assert line.startswith(whole[dummy:], at)
        cursor = at - dummy
        for part in piece:
            held = owners[max(cursor, at) : cursor + len(part)]
            roles.append(next((who for who in held if who), SCAFFOLD))
            cursor += len(part)
        at, index = cursor, stop
    assert at == len(line)
    return roles


def encode_one(renderer: ChatRenderer, turns: list[Turn], max_length: int = 10_000) -> Encoded:
    (encoded,) = renderer.encode([turns], max_length)
    assert isinstance(encoded, Encoded), encoded
    return encoded


# --- arbitrary conversations --------------------------------------------------------------------------------

FRAGMENTS = [
    *(
        "user",
        "assistant",
        "system",
        "model",
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "?",
        "",
        "[INST]",
        "[/INST] ",
        "<<SYS>>\n",
    ),
    *(
        "<|im_end|>\n",
        "<|im_start|>user\n",
        "</s>",
        "<|eot_id|>",
        "<end_of_turn>\n",
        "1 2 3",
        "The capital of France",
    ),
    *(
        "\n<</SYS>>\n\n",
        "é",
        "e\u0301",
        "你好",
        "😀",
        "👩‍👩‍👧",
        "שלום",
        "مرحبا",
        "\u00a0",
        "\u3000",
        "Ġ",
        "{{ x }}",
        "\x00",
    ),
]
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(CHARACTERS, max_size=4), max_size=6).map("".join)
# a thought is recognised by its tags, so they must not come about by chance
FREE = TEXTS.filter(lambda text: "think>" not in text)


@st.composite
def conversations(draw: st.DrawFn, system: bool = True, texts: st.SearchStrategy[str] = FREE) -> list[tuple[str, str]]:
    pairs = [("system", draw(texts))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        pairs += [("user", draw(texts)), ("assistant", draw(texts))]
    return pairs


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
BRIEF = settings(QUICK, max_examples=25)


@pytest.mark.parametrize("style", STYLES)
@given(data=st.data())
@QUICK
def test_rendering_and_spans_are_those_of_the_format(style: str, data: st.DataObject) -> None:
    known = STYLES[style]
    pairs = data.draw(conversations(known.has_system))
    chunks = known.chunks(pairs)
    rendered = renderer_of("byte_exact", known.template).render(turns_of(*pairs))
    assert rendered == Rendered(text_of(chunks), spans_of(chunks))


@given(st.lists(st.tuples(FREE, st.none() | FREE, FREE), min_size=1, max_size=3))
@example([("q", "why", "user"), ("q", "so", "so"), ("user", None, "assistant")])
@QUICK
def test_thoughts_of_earlier_turns_are_dropped_and_the_rest_is_found(
    rounds: list[tuple[str, str | None, str]],
) -> None:
    pairs = []
    for question, thought, answer in rounds:
        if thought is not None:
            answer = f"<think>\n{thought.strip()}\n</think>\n\n{answer.lstrip()}"
        pairs += [("user", question), ("assistant", answer)]
    chunks = STYLES["qwen3"].chunks(pairs)
    rendered = renderer_of("byte_exact", QWEN3).render(turns_of(*pairs))
    assert rendered.text == text_of(chunks)
    assert rendered.spans == spans_of(chunks)


@pytest.mark.parametrize("style", ["chatml", "llama2", "mistral"])
@pytest.mark.parametrize("engine", ENGINES)
@given(data=st.data())
@BRIEF
def test_roles_are_those_of_the_bytes_that_each_token_holds(engine: str, style: str, data: st.DataObject) -> None:
    known = STYLES[style]
    pairs = data.draw(conversations(known.has_system))
    chunks = known.chunks(pairs)
    encoded = encode_one(renderer_of(engine, known.template), turns_of(*pairs))
    tokens = tokenizer_of(engine).convert_ids_to_tokens(encoded.token_ids.tolist())
    assert encoded.roles.tolist() == expected_roles(tokens, engine, chunks)
    assert not encoded.truncated


@pytest.mark.parametrize("engine", ENGINES)
@given(pairs=conversations())
@BRIEF
def test_plain_roles_are_those_of_the_bytes_too(engine: str, pairs: list[tuple[str, str]]) -> None:
    chunks: Chunks = []
    for role, text in pairs:
        chunks += [(2 if role == "assistant" else 1, text), (0, "\n")]
    chunks[-1] = (0, "</s>")
    encoded = encode_one(renderer_of(engine, None), turns_of(*pairs))
    tokens = tokenizer_of(engine).convert_ids_to_tokens(encoded.token_ids.tolist())
    assert encoded.roles.tolist() == expected_roles(tokens, engine, chunks)


@pytest.mark.parametrize("engine", ["byte_trim", "bpe_legacy", "unigram"])
@given(pairs=conversations(texts=FREE.filter(lambda text: not any(token in text for token in CONTROL_TOKENS))))
@BRIEF
def test_scoped_tokens_spell_the_records_own_text(engine: str, pairs: list[tuple[str, str]]) -> None:
    encoded = encode_one(renderer_of(engine, CHATML), turns_of(*pairs))
    tokens = tokenizer_of(engine).convert_ids_to_tokens(encoded.token_ids.tolist())
    for role, names in ((PROMPT, {"system", "user"}), (RESPONSE, {"assistant"})):
        spelt = b"".join(
            bytes_of(token, engine) for token, is_role in zip(tokens, encoded.roles == role, strict=True) if is_role
        )
        own = "".join(text for name, text in pairs if name in names)
        assert "".join(spelt.decode().split()) == "".join(own.split())


@pytest.mark.parametrize("engine", ENGINES)
@given(pairs=conversations())
@BRIEF
def test_tokens_are_the_tokenizers_own(engine: str, pairs: list[tuple[str, str]]) -> None:
    tokenizer, renderer = tokenizer_of(engine), renderer_of(engine, CHATML)
    text = text_of(STYLES["chatml"].chunks(pairs))
    encoded = encode_one(renderer, turns_of(*pairs))
    assert encoded.token_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (encoded.token_ids.dtype, encoded.roles.dtype) == (np.int32, np.uint8)


@pytest.mark.parametrize("template", [None, CHATML])
@given(batch=st.lists(conversations(), max_size=5))
@BRIEF
def test_a_batch_gives_what_its_records_give_alone(template: str | None, batch: list[list[tuple[str, str]]]) -> None:
    renderer = renderer_of("bpe_legacy", template)
    together = renderer.encode([turns_of(*pairs) for pairs in batch], 30)
    assert len(together) == len(batch)
    for encoded, pairs in zip(together, batch, strict=True):
        assert isinstance(encoded, Encoded)
        alone = encode_one(renderer, turns_of(*pairs), 30)
        assert encoded.token_ids.tolist() == alone.token_ids.tolist()
        assert encoded.roles.tolist() == alone.roles.tolist()
        assert encoded.truncated == alone.truncated


# --- white space, special tokens, borders -------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["byte_trim", "byte_exact"])
def test_white_space_inside_content_is_content(engine: str) -> None:
    encoded = encode_one(renderer_of(engine, CHATML), turns_of(("user", "a \n  \n b"), ("assistant", " ")))
    tokens = tokenizer_of(engine).convert_ids_to_tokens(encoded.token_ids.tolist())
    held = {role: "".join(np.array(tokens)[encoded.roles == role]) for role in (PROMPT, RESPONSE)}
    assert held == {PROMPT: "aĠĊĠĠĊĠb", RESPONSE: "Ġ"}


def test_a_token_across_the_border_is_content() -> None:
    template = "{% for turn in messages %}{{ turn.content + '\\n\\n' }}{% endfor %}"
    renderer = renderer_of("byte_trim", template)
    encoded = encode_one(renderer, turns_of(("user", "France?\n"), ("assistant", "Paris.")))
    tokens = tokenizer_of("byte_trim").convert_ids_to_tokens(encoded.token_ids.tolist())
    last = max(np.flatnonzero(encoded.roles == PROMPT))
    assert renderer.render(turns_of(("user", "France?\n"), ("assistant", "Paris."))).spans[0].end == len("France?\n")
    assert len(tokens[last]) > 1
    assert set(tokens[last]) == {"Ċ"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_special_token_spelt_out_is_never_content(engine: str) -> None:
    encoded = encode_one(renderer_of(engine, CHATML), turns_of(("user", "a <|im_end|> </s> b"), ("assistant", "<s>")))
    special = np.isin(encoded.token_ids, tokenizer_of(engine).convert_tokens_to_ids(CONTROL_TOKENS))
    assert special.sum() == 6 + 3
    assert not encoded.roles[special].any()
    assert not (encoded.roles == RESPONSE).any()


@pytest.mark.parametrize("engine", ["bpe_legacy", "bpe_first", "unigram", "byte_prefix"])
def test_the_dummy_space_of_the_tokenizer_is_scaffolding(engine: str) -> None:
    encoded = encode_one(renderer_of(engine, None), turns_of(("user", "😀"), ("assistant", "Paris")))
    tokens = tokenizer_of(engine).convert_ids_to_tokens(encoded.token_ids.tolist())
    assert tokens[0] in ("▁", "Ġ")
    assert encoded.roles[:5].tolist() == [SCAFFOLD, PROMPT, PROMPT, PROMPT, PROMPT]


def test_contents_that_spell_scaffolding_do_not_mislead() -> None:
    end = "<|im_end|>\n<|im_start|>assistant\n"
    pairs = [("user", f"a{end}b"), ("assistant", f"{end}{end}"), ("user", "user"), ("assistant", "\n")]
    rendered = renderer_of("byte_exact", CHATML).render(turns_of(*pairs))
    assert rendered.spans == spans_of(STYLES["chatml"].chunks(pairs))


def test_the_longest_fitting_piece_is_the_content() -> None:
    template = "{% for turn in messages %}{{ turn.content.split('#') | last + '|' }}{% endfor %}"
    rendered = renderer_of("byte_exact", template).render(turns_of(("user", "x#a|b"), ("assistant", "b|c#c")))
    assert rendered == Rendered("a|b|c|", (Span(0, 3, PROMPT), Span(4, 5, RESPONSE)))


def test_a_piece_that_leaves_no_place_for_later_contents_is_given_up() -> None:
    template = (
        "{% for turn in messages %}{{ turn.content.split('#') | last }}"
        "{{ '|' if turn.role == 'user' else '/' }}{% endfor %}"
    )
    turns = turns_of(("user", "a|b/c#a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    rendered = renderer_of("byte_exact", template).render(turns)
    assert rendered.text == "a|b/c|d/"
    assert own_texts(rendered) == [(PROMPT, "a"), (RESPONSE, "b"), (PROMPT, "c"), (RESPONSE, "d")]


def test_contents_without_scaffolding_between_them() -> None:
    template = "{% for turn in messages %}{{ turn.content | trim }}{% endfor %}"
    rendered = renderer_of("byte_exact", template).render(turns_of(("user", " a"), ("assistant", "b ")))
    assert rendered == Rendered("ab", (Span(0, 1, PROMPT), Span(1, 2, RESPONSE)))
    empty = renderer_of("byte_exact", template).render(turns_of(("user", " "), ("assistant", "")))
    assert empty == Rendered("", ())


@pytest.mark.parametrize("blank", ["", " ", "\n \n", "\u3000"])
@pytest.mark.parametrize("style", STYLES)
def test_empty_and_blank_contents(style: str, blank: str) -> None:
    known = STYLES[style]
    full = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]
    for are_blank in itertools.product([False, True], repeat=3):
        pairs = [(role, blank if is_blank else text) for (role, text), is_blank in zip(full, are_blank, strict=True)]
        pairs = pairs if known.has_system else pairs[1:]
        chunks = known.chunks(pairs)
        rendered = renderer_of("byte_exact", known.template).render(turns_of(*pairs))
        assert rendered == Rendered(text_of(chunks), spans_of(chunks))


# --- adapted conversations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [GEMMA, MISTRAL])
def test_a_refused_or_dropped_system_text_is_folded_into_the_first_user_turn(template: str) -> None:
    renderer = renderer_of("byte_exact", template)
    turns = turns_of(("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"))
    rendered = renderer.render(turns)
    assert rendered.text == renderer.render(turns_of(("user", "Be brief.\n\nHi"), ("assistant", "Ho"))).text
    assert own_texts(rendered) == [(PROMPT, "Be brief."), (PROMPT, "Hi"), (RESPONSE, "Ho")]


def test_a_system_text_that_the_template_moves_is_found_where_it_went() -> None:
    turns = turns_of(("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"))
    rendered = renderer_of("byte_exact", MISTRAL).render(turns)
    assert rendered.text == "<s>[INST] U[/INST] A</s>[INST] S\n\nV[/INST]"
    assert own_texts(rendered) == [(PROMPT, "U"), (RESPONSE, "A"), (PROMPT, "S"), (PROMPT, "V")]


def test_tool_turns_and_runs_of_one_role_are_merged() -> None:
    turns = turns_of(
        ("system", " S"),
        ("user", "U "),
        ("user", ""),
        ("assistant", "A"),
        ("assistant", "B"),
        ("tool", "T"),
        ("user", "V"),
    )
    rendered = renderer_of("byte_exact", LLAMA2).render(turns)
    assert rendered.text == "<s>[INST] <<SYS>>\n S\n<</SYS>>\n\nU [/INST] A\n\nB </s><s>[INST] T\n\nV [/INST]"
    assert own_texts(rendered) == [
        *((PROMPT, " S"), (PROMPT, "U"), (RESPONSE, "A"), (RESPONSE, "B"), (PROMPT, "T"), (PROMPT, "V"))
    ]


@given(
    pairs=conversations(),
    extra=st.lists(st.tuples(st.sampled_from(["user", "tool", "assistant"]), FREE), max_size=3),
)
@QUICK
def test_merged_turns_keep_their_own_text(pairs: list[tuple[str, str]], extra: list[tuple[str, str]]) -> None:
    pairs = pairs + extra
    rendered = renderer_of("byte_exact", GEMMA).render(turns_of(*pairs))
    for role in (PROMPT, RESPONSE):
        own = "".join(text for name, text in pairs if (RESPONSE if name == "assistant" else PROMPT) == role)
        assert "".join("".join(t for r, t in own_texts(rendered) if r == role).split()) == "".join(own.split())


def test_a_tool_turn_that_the_template_skips_is_not_lost() -> None:
    template = (
        "{% for turn in messages if turn.role in ('user', 'assistant') %}"
        "{{ '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>' }}{% endfor %}"
    )
    rendered = renderer_of("byte_exact", template).render(turns_of(("user", "U"), ("tool", "T"), ("assistant", "A")))
    assert own_texts(rendered) == [(PROMPT, "U"), (PROMPT, "T"), (RESPONSE, "A")]


# --- what cannot be rendered --------------------------------------------------------------------------------

REWRITES = "{% for turn in messages %}{{ turn.content | replace('colour', 'color') + '<|im_end|>' }}{% endfor %}"


def test_reasons_name_the_cause() -> None:
    with pytest.raises(RenderError, match="user and assistant must take turns"):
        renderer_of("byte_exact", GEMMA).render(turns_of(("assistant", "A"), ("user", "U")))
    with pytest.raises(RenderError, match="rewrites the text"):
        renderer_of("byte_exact", REWRITES).render(turns_of(("user", "U"), ("assistant", "a colour")))
    bare = "{% for turn in messages %}{{ turn.content | replace('colour', 'color') }}{% endfor %}"
    with pytest.raises(RenderError, match="rewrites the text"):
        renderer_of("byte_exact", bare).render(turns_of(("user", "a colour"), ("assistant", "A")))
    with pytest.raises(RenderError, match="leaves out or rewrites the text of turn 2"):
        renderer_of("byte_exact", "{{ messages[0].content }}").render(turns_of(("user", "U"), ("assistant", "A")))
    with pytest.raises(RenderError, match="no turns"):
        renderer_of("byte_exact", None).render([])
    with pytest.raises(RenderError, match="refuses the record: unsupported operand"):
        renderer_of("byte_exact", "{{ messages[0].content / 2 }}").render(turns_of(("user", "U")))


@pytest.mark.parametrize("template", [None, CHATML])
def test_half_a_surrogate_pair_is_refused(template: str | None) -> None:
    with pytest.raises(RenderError, match="Unicode"):
        renderer_of("byte_exact", template).render(turns_of(("user", "a\ud83d"), ("assistant", "A")))


def test_a_bad_record_does_not_disturb_the_others() -> None:
    renderer = renderer_of("byte_trim", REWRITES)
    good, bad, other = (turns_of(("user", "U"), ("assistant", text)) for text in ("A", "colour", "Paris is nice"))
    results = renderer.encode([bad, good, bad, other, []], 100)
    assert [isinstance(result, RenderError) for result in results] == [True, False, True, False, True]
    for result, turns in ((results[1], good), (results[3], other)):
        assert isinstance(result, Encoded)
        alone = encode_one(renderer, turns)
        assert result.token_ids.tolist() == alone.token_ids.tolist()
        assert result.roles.tolist() == alone.roles.tolist()
    assert all(isinstance(result, RenderError) for result in renderer.encode([bad, bad], 100))
    assert renderer.encode([], 100) == []


def test_user_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="not a fast one"):
        ChatRenderer(ByT5Tokenizer())
    with pytest.raises(UserError, match=r"line 2: .*model\.chat_template"):
        ChatRenderer(tokenizer_of("byte_exact"), "x\n{% for %}")
    several = PreTrainedTokenizerFast(tokenizer_object=_byte_level(trim=False))
    several.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(UserError, match="no default one"):
        ChatRenderer(several)
    several.chat_template = {"default": GEMMA, "tool_use": CHATML}
    assert "start_of_turn" in ChatRenderer(several).render(turns_of(("user", "U"))).text


# --- length, end of sequence, clock, identity ---------------------------------------------------------------


@pytest.mark.parametrize("template", [None, CHATML])
def test_records_are_cut_at_the_end(template: str | None) -> None:
    renderer = renderer_of("byte_trim", template)
    turns = turns_of(("user", "What is the capital?"), ("assistant", "Paris, of course."))
    whole = encode_one(renderer, turns)
    length = len(whole.token_ids)
    for kept in (1, length - 1, length, length + 1):
        cut = encode_one(renderer, turns, kept)
        assert cut.token_ids.tolist() == whole.token_ids[:kept].tolist()
        assert cut.roles.tolist() == whole.roles[:kept].tolist()
        assert cut.truncated == (kept < length)


def _special_adder(single: str) -> PreTrainedTokenizerFast:
    engine = _byte_level(trim=True)
    places = [(token, engine.token_to_id(token)) for token in ("<s>", "</s>")]
    engine.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=single, special_tokens=places),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_plain_text_ends_with_one_end_of_sequence(single: str) -> None:
    tokenizer = _special_adder(single)
    turns = turns_of(("user", "Capital?"), ("assistant", "Paris</s>"))
    encoded = encode_one(ChatRenderer(tokenizer), turns)
    tokens = tokenizer.convert_ids_to_tokens(encoded.token_ids.tolist())
    assert tokens[0] == "<s>"
    assert tokens[-2:] == ["</s>", "</s>"]  # the record's own and the one that ends the sequence
    assert tokens[-3] != "</s>"
    assert encoded.roles[[0, -1, -2]].tolist() == [SCAFFOLD] * 3


def test_template_text_gets_no_second_beginning_of_sequence() -> None:
    tokenizer = _special_adder("<s> $A </s>")
    encoded = encode_one(ChatRenderer(tokenizer, GEMMA), turns_of(("user", "U"), ("assistant", "A")))
    tokens = tokenizer.convert_ids_to_tokens(encoded.token_ids.tolist())
    assert (tokens.count("<s>"), tokens.count("</s>")) == (1, 0)


def test_plain_without_an_end_of_sequence_token() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level(trim=True))
    encoded = encode_one(ChatRenderer(tokenizer), turns_of(("user", "U"), ("assistant", "A")))
    assert tokenizer.convert_ids_to_tokens(encoded.token_ids.tolist()) == ["U", "Ċ", "A"]
    assert encoded.roles.tolist() == [PROMPT, SCAFFOLD, RESPONSE]


ASKS_CLOCK = "  {% if true %}{{ strftime_now('%d %B %Y, %Y-%m-%d') }}{% endif %}\n\n{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA3, "Today Date: 26 Jul 2024\n"),
        (ASKS_CLOCK, "26 July 2024, 2024-07-26\nU"),
        ("\n" + ASKS_CLOCK, "\n26 July"),
    ],
)
def test_no_template_reads_the_clock(template: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhen(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Elsewhen:
            return cls(1999, 12, 31, tzinfo=tz)

    turns = turns_of(("user", "U"))
    before = ChatRenderer(tokenizer_of("byte_exact"), template).render(turns)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Elsewhen)
    probe = [{"role": "user", "content": "U"}]
    clocked = tokenizer_of("byte_exact").apply_chat_template(probe, chat_template=template, tokenize=False)
    assert "1999" in clocked  # the patched clock is the one that templates read
    after = ChatRenderer(tokenizer_of("byte_exact"), template).render(turns)
    assert before == after
    assert expected in before.text
    assert before.text.startswith(clocked[: clocked.index("31")].rpartition("\n")[0])


def test_templates_are_told_the_date() -> None:
    rendered = renderer_of("byte_exact", "{{ date_string + messages[0].content }}").render(turns_of(("user", "U")))
    assert rendered.text == "26 Jul 2024U"


def test_stopping_the_clock_changes_nothing_but_the_date(monkeypatch: pytest.MonkeyPatch) -> None:
    class ThatDay(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> ThatDay:
            return cls(2024, 7, 26, tzinfo=tz)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", ThatDay)
    codes = "%d %-d %e %b %B %m %-m %Y %y %j %a %A %F %D %H %I %M %S %p %T"
    in_macro = "{% macro year() %}{{ strftime_now('%Y') }}{% endmacro %}{{ year() }}"
    for lead in ("", "\n", "  ", "\n  ", "text ", in_macro):
        template = lead + "{% set now = strftime_now('" + codes + "') %}\n  {{ now + messages[0].content }}\n"
        theirs = tokenizer_of("byte_exact").apply_chat_template(
            [{"role": "user", "content": "U"}], chat_template=template, tokenize=False
        )
        assert ChatRenderer(tokenizer_of("byte_exact"), template).render(turns_of(("user", "U"))).text == theirs


def test_identity_follows_the_template() -> None:
    plain, chatml, gemma = (renderer_of("byte_exact", template).identity for template in (None, CHATML, GEMMA))
    assert plain["chat_template"] == "plain"
    assert len({json.dumps(identity) for identity in (plain, chatml, gemma)}) == 3
    own = PreTrainedTokenizerFast(tokenizer_object=_byte_level(trim=True), chat_template=CHATML)
    assert ChatRenderer(own).identity == chatml


def test_padding_and_cutting_set_on_the_tokenizer_have_no_effect() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(trim=True), pad_token="</s>", eos_token="</s>", bos_token="<s>"
    )
    turns = [turns_of(("user", "U")), turns_of(("user", "What is the capital of France?"))]
    before = ChatRenderer(tokenizer).encode(turns, 100)
    tokenizer(["a", "b b b b"], padding=True, truncation=True, max_length=3)
    after = ChatRenderer(tokenizer).encode(turns, 100)
    assert [item.token_ids.tolist() for item in before] == [item.token_ids.tolist() for item in after]
    assert tokenizer.backend_tokenizer.padding is not None  # left as the other user set it


def test_special_tokens_are_split_where_the_tokenizer_is_told_to() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(trim=True), eos_token="</s>", split_special_tokens=True
    )
    encoded = encode_one(ChatRenderer(tokenizer, CHATML), turns_of(("user", "</s>"), ("assistant", "A")))
    held = tokenizer.convert_ids_to_tokens(encoded.token_ids[encoded.roles == PROMPT].tolist())
    assert len(held) > 1
    assert "".join(held) == "</s>"


def test_a_token_that_holds_no_character_is_scaffolding() -> None:
    ranges = np.array([[0, 2], [1, 1], [1, 3], [2, 4], [4, 4], [4, 9]])
    spans = np.array([[0, 2, PROMPT], [4, 6, RESPONSE]])
    assert _roles_of(ranges, spans).tolist() == [PROMPT, SCAFFOLD, PROMPT, SCAFFOLD, SCAFFOLD, RESPONSE]


def test_a_renderer_can_be_sent_to_another_process() -> None:
    renderer = renderer_of("byte_trim", CHATML)
    turns = turns_of(("user", "U"), ("assistant", "A"))
    sent = pickle.loads(pickle.dumps(renderer))
    assert encode_one(sent, turns).token_ids.tolist() == encode_one(renderer, turns).token_ids.tolist()


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, trim_lightning.tokens.rendering; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
