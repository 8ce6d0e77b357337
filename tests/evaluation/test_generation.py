"""Greedy answers against a naive loop, one prompt and one token at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel

from evaluation.conftest import CPU, Opened, Plain, varied_pairs
from trim_lightning.engine.devices import Resources
from trim_lightning.evaluation.generation import (
    BATCH,
    AnswerLimits,
    answer_prompts,
    end_tokens,
    plan_answers,
    read_answers,
    run_answer_pass,
)

Load = Callable[[str], PreTrainedModel]


def answers(
    model: PreTrainedModel, opened: Opened, ends: list[int], most: int = 12, **options: object
) -> dict[int, str]:
    """The product's answers to all records."""
    file, tokens, renderer = opened
    prompts = answer_prompts(file, tokens, range(len(file)), renderer, 400)
    return generate_answers(model, renderer._tokenizer, prompts, AnswerLimits(ends, most, **options))  # type: ignore[arg-type]


def generate_answers(
    model: PreTrainedModel, tokenizer: Any, prompts: dict[int, NDArray[np.int32]], limits: AnswerLimits
) -> dict[int, str]:
    """The product's answers to some prompts."""
    with tempfile.TemporaryDirectory() as folder:
        run_answer_pass(model, prompts, limits, Path(folder), resources=Resources(CPU))
        return read_answers(Path(folder), prompts, limits, tokenizer)


def prompt_ids(reference: Plain, pair: dict[str, str]) -> list[int]:
    """The tokens before the response, from text put together by hand."""
    text = f"<|im_start|>user\n{pair['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    return list(reference.tokenizer(text)["input_ids"])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "gemma3"])
def test_answers_are_those_of_a_naive_loop(
    architecture: str, tiny_model: Load, plain: Callable[[str], Plain], opened: Callable[..., Opened]
) -> None:
    pairs = varied_pairs(BATCH + 4)  # two batches of prompts of many lengths
    reference = plain(architecture)
    naive = {row: reference.greedy(prompt_ids(reference, pair), [], 12) for row, pair in enumerate(pairs)}
    # a token that some answers reach early and others do not
    ends = [max({token for found in naive.values() for token in found[2:]})]
    found = answers(tiny_model(architecture), opened(pairs, architecture=architecture), ends)
    lengths = set()
    for row, tokens in naive.items():
        kept = tokens[: tokens.index(ends[0])] if ends[0] in tokens else tokens
        lengths.add(len(kept))
        assert found[row] == reference.tokenizer.decode(kept, skip_special_tokens=True), row
    assert len(lengths) > 1


def test_a_batch_does_not_change_an_answer(tiny_model: Load, opened: Callable[..., Opened]) -> None:
    pairs, model = varied_pairs(7), tiny_model("llama")
    together = answers(model, opened(pairs), [1])
    assert [answers(model, opened([pair]), [1])[0] for pair in pairs] == [together[row] for row in range(7)]


def test_the_model_s_own_generation_settings_are_set_aside(tiny_model: Load, opened: Callable[..., Opened]) -> None:
    model, pairs = tiny_model("llama"), varied_pairs(5)
    expected = answers(model, opened(pairs), [1], most=25)
    own = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=3.0, no_repeat_ngram_size=2)
    model.generation_config = own
    assert answers(model, opened(pairs), [1], most=25) == expected
    assert model.generation_config is own
    with_penalty = model.generate(  # the settings do matter to this model
        input_ids=model.dummy_inputs["input_ids"], do_sample=False, max_new_tokens=25, pad_token_id=2
    )
    model.generation_config = GenerationConfig()
    without = model.generate(
        input_ids=model.dummy_inputs["input_ids"], do_sample=False, max_new_tokens=25, pad_token_id=2
    )
    assert with_penalty.tolist() != without.tolist()


def test_stop_texts_cut_an_answer(tiny_model: Load, opened: Callable[..., Opened]) -> None:
    model, pairs = tiny_model("llama"), varied_pairs(4)
    whole = answers(model, opened(pairs), [1])
    mark = whole[0][3:5]
    cut = answers(model, opened(pairs), [1], stop=[mark])
    assert cut[0] == whole[0][: whole[0].index(mark)]
    assert all(cut[row] == whole[row].split(mark)[0] for row in range(4))


def test_end_tokens_are_eos_and_the_template_s_own(opened: Callable[..., Opened]) -> None:
    _, tokens, renderer = opened(varied_pairs(3))
    tokenizer = renderer._tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens(tokens, tokenizer) == [end]
    tokenizer.eos_token = "<pad>"  # as base tokenizers have it: EOS is not what ends a turn
    assert end_tokens(tokens, tokenizer) == sorted([end, tokenizer.convert_tokens_to_ids("<pad>")])


# where an answer begins


def prompts_of(opened: Opened) -> list[str]:
    file, tokens, renderer = opened
    found = answer_prompts(file, tokens, range(len(file)), renderer, 400)
    return [renderer._tokenizer.decode(found[row].tolist()) for row in range(len(file))]


HEAD = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_ends_where_the_response_begins(opened: Callable[..., Opened]) -> None:
    pairs = varied_pairs(4)
    assert prompts_of(opened(pairs)) == [HEAD.format(pair["prompt"]) for pair in pairs]


def test_a_record_without_a_response_is_answered_all_the_same(opened: Callable[..., Opened]) -> None:
    empty = {"prompt": "how many eggs", "response": "", "answer": "12"}
    assert prompts_of(opened([empty])) == [HEAD.format("how many eggs")]


def test_a_conversation_is_answered_at_its_end(opened: Callable[..., Opened]) -> None:
    turns = [("user", "add 3 and 4"), ("assistant", "7"), ("user", "and 5"), ("assistant", "12")]
    before = "<|im_start|>user\nadd 3 and 4<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n" + HEAD.format("and 5")
    records = [{"messages": [{"role": role, "content": text} for role, text in turns[:end]]} for end in (4, 3)]
    assert prompts_of(opened(records)) == [before, before]  # with its last response, and without


def test_a_special_token_in_a_response_gives_nothing_away(opened: Callable[..., Opened]) -> None:
    record = {"prompt": "spell it", "response": "the secret<|im_end|>is out"}
    assert prompts_of(opened([record])) == [HEAD.format("spell it")]


# prompts that leave little room


def test_batches_hold_every_row_with_room_once_and_no_tight_prompt_shortens_others() -> None:
    lengths = {row: 5 + 3 * row % 41 for row in range(50)}
    limits, rooms = AnswerLimits([], max_new_tokens=10, max_positions=40), set()
    plan = [(shard.batches[0], shard.batches[1:]) for shard in plan_answers(lengths, limits)]
    assert sorted(row for rows, _ in plan for row in rows) == [row for row in range(50) if lengths[row] < 40]
    for rows, more in plan:
        assert not more, "a shard for each batch"
        room = limits.room(max(lengths[row] for row in rows))
        assert room == min(10, 40 - max(lengths[row] for row in rows))
        assert len(rows) <= (BATCH if room == 10 else 1)
        rooms.add(room)
    assert 10 in rooms
    assert 1 in rooms
    assert limits.room(41) == 0


def test_a_model_is_not_asked_for_more_than_it_takes(tiny_model: Load, opened: Callable[..., Opened]) -> None:
    """OPT has a table of 512 positions and fails beyond it."""
    file, tokens, renderer = opened([{"prompt": "word " * 120, "response": "x"}, *varied_pairs(3)], 600, "opt")
    prompts = answer_prompts(file, tokens, range(4), renderer, 600)
    assert 0 < 512 - len(prompts[0]) < 30
    tight = dict(prompts) | {4: np.tile(prompts[0], 2)[:512]}
    found = generate_answers(tiny_model("opt"), renderer._tokenizer, tight, AnswerLimits([], 30, 512))
    alone = generate_answers(tiny_model("opt"), renderer._tokenizer, {1: prompts[1]}, AnswerLimits([], 30))
    assert found[4] == ""
    assert found[0] != ""
    assert found[1] == alone[1]
