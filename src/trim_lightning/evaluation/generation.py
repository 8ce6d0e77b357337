"""Greedy answers to held-out prompts, in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from trim_lightning.console.progress import progress_bar
from trim_lightning.records.record import Turn
from trim_lightning.records.record_file import RecordFile
from trim_lightning.tokens.rendering import ChatRenderer, Encoded
from trim_lightning.tokens.spans import PROMPT, RESPONSE
from trim_lightning.tokens.tokenized import TokenizedRecords, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 16  # prompts generated together
STEPS = 8  # generated tokens that are timed


def answer_prompts(
    held_out: RecordFile, tokens: TokenizedRecords, rows: Sequence[int], renderer: ChatRenderer, max_length: int
) -> dict[int, NDArray[np.int32]]:
    """The tokens that each record's answer continues.

    They are those before its last response. A record without one (empty, or not given) is rendered with a
    placeholder in its place.

    Returns:
        Row to ``[prompt]`` int32; rows that cannot be rendered are left out.
    """
    prompts = {row: prompt_of(tokens[row]) for row in rows if tokens.lengths[row]}
    lacking = [row for row, prompt in prompts.items() if len(prompt) == tokens.lengths[row]]
    rendered = renderer.encode([unanswered(held_out.record(row).turns) for row in lacking], max_length)
    for row, encoded in zip(lacking, rendered, strict=True):
        if isinstance(encoded, Encoded):
            prompts[row] = encoded.token_ids[: last_response(encoded.roles)]
    return prompts


def prompt_of(sequence: TokenSequence) -> NDArray[np.int32]:
    """Tokens before the last response, exactly as the model saw them in training.

    Returns:
        ``[prompt]`` int32; the whole sequence if no response follows the last prompt.
    """
    return sequence.token_ids[: last_response(sequence.roles)]


def last_response(roles: NDArray[np.uint8]) -> int:
    """Place of the first response token after the last prompt token; the sequence's length if there is none.

    A special token that a response spells out is scaffolding too, so a gap alone does not begin a new response.
    """
    prompt = np.flatnonzero(roles == PROMPT)
    start = int(prompt[-1]) + 1 if len(prompt) else 0
    response = np.flatnonzero(roles[start:] == RESPONSE)
    return start + int(response[0]) if len(response) else len(roles)


def unanswered(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """A conversation whose last response is one letter, so that its rendering tells where a response would begin."""
    before = turns[:-1] if turns and turns[-1].role == "assistant" else turns
    return (*before, Turn("assistant", "A"))


def end_tokens(records: TokenizedRecords, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: EOS, and the special token that the template puts behind a response."""
    ends = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for row in range(min(len(records), 50)):
        sequence = records[row]
        response = np.flatnonzero(sequence.roles == RESPONSE)
        if len(response) and response[-1] + 1 < len(sequence.token_ids):
            following = int(sequence.token_ids[response[-1] + 1])
            if following in special:
                ends.add(following)
    return sorted(ends)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[int, NDArray[np.int32]],
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    max_positions: int | None = None,
    stop: Sequence[str] = (),
    title: str = "generate",
) -> dict[int, str]:
    """Greedy continuation of each prompt ``[prompt]``, on the model's device.

    An answer ends at one of the tokens ``ends`` and is cut at one of the texts ``stop``. Prompt and answer together
    take at most ``max_positions`` tokens, if the model says how many.

    Returns:
        Row to answer text; empty where the prompt leaves the model no room.
    """
    answers: dict[int, str] = {}
    with progress_bar(title, total=len(prompts), unit="answers") as bar, plain_generation(model):
        for rows, room in batches({row: len(prompt) for row, prompt in prompts.items()}, max_new_tokens, max_positions):
            continued = continuations(model, [prompts[row] for row in rows], ends, room) if room else [[]] * len(rows)
            for row, tokens in zip(rows, continued, strict=True):
                answers[row] = finish(tokens, tokenizer, ends, stop)
            bar.update(len(rows))
    return answers


def batches(
    lengths: Mapping[int, int], max_new_tokens: int, max_positions: int | None
) -> Iterator[tuple[list[int], int]]:
    """Rows to generate together, longest prompts first, and how many tokens they may get.

    Prompts without room for ``max_new_tokens`` are alone, so that they do not shorten the answers of others.
    """
    limit = max_positions or max(lengths.values(), default=0) + max_new_tokens
    order = sorted(lengths, key=lambda row: (-lengths[row], row))
    tight = [row for row in order if lengths[row] + max_new_tokens > limit]
    for row in tight:
        yield [row], max(0, limit - lengths[row])
    for start in range(len(tight), len(order), BATCH):
        yield order[start : start + BATCH], max_new_tokens


def continuations(
    model: PreTrainedModel, prompts: Sequence[NDArray[np.int32]], ends: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """Greedily generated token ids after each prompt."""
    pad = ends[0] if ends else 0
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for line, prompt in enumerate(prompts):  # padding on the left: generation goes on from the last column
        input_ids[line, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[line, width - len(prompt) :] = 1
    generate: Any = model.generate
    with torch.inference_mode():
        output = generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
        )
    tokens: list[list[int]] = output[:, width:].tolist()
    return tokens


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Set a model's own generation settings aside: some sample, or punish repetition even in greedy decoding."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def decoding_seconds(model: PreTrainedModel, records: TokenizedRecords) -> tuple[float, float]:
    """Seconds until a batch of answers has its first token, and of each later one: of a few, to middling prompts."""
    prompts = sorted((prompt_of(records[row]) for row in range(len(records)) if records.lengths[row]), key=len)
    middle = max(0, (len(prompts) - BATCH) // 2)

    def run(steps: int) -> float:
        started = time.perf_counter()
        continuations(model, prompts[middle : middle + BATCH], [], steps)  # no end tokens: none stops early
        return time.perf_counter() - started

    with plain_generation(model):
        run(1)
        first, more = run(1), run(1 + STEPS)
    return first, max(0.0, more - first) / STEPS


def finish(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], stop: Sequence[str]) -> str:
    """Cut generated tokens at the first end token and the text at the first stop text."""
    first_end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    text = str(tokenizer.decode(list(tokens[:first_end]), skip_special_tokens=True))
    for mark in stop:
        text = text.split(mark, 1)[0]
    return text
