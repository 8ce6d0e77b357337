"""Greedy answers to held-out prompts, in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from trim_lightning.engine.batches import Shard
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.modules import ForwardPass, in_step
from trim_lightning.engine.sharded_pass import run_sharded_pass
from trim_lightning.engine.shards import TableShards, ragged, shard_path, write_shard
from trim_lightning.models.load import ModelRecipe
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


@dataclass(frozen=True)
class AnswerLimits:
    """Where answers end.

    Attributes:
        ends: Tokens that end one.
        max_new_tokens: Most tokens of one.
        max_positions: Most tokens of prompt and answer together; None: whatever the model takes.
        stop: Texts at which one is cut.
    """

    ends: Sequence[int]
    max_new_tokens: int
    max_positions: int | None = None
    stop: Sequence[str] = ()

    def room(self, prompt: int) -> int:
        """Tokens that the answer to a prompt of this length may get."""
        return max(0, min(self.max_new_tokens, (self.max_positions or prompt + self.max_new_tokens) - prompt))


class AnswerPass(ForwardPass):
    """Greedy answers; ``predict_step`` returns the generated tokens of each of the batch's prompts."""

    def __init__(self, model: PreTrainedModel | ModelRecipe, limits: AnswerLimits) -> None:
        super().__init__(model)
        self.limits = limits

    def on_batch(self, batch: Mapping[str, Any]) -> list[list[int]]:
        lengths = batch["lengths"].tolist()
        prompts = [ids[:length].cpu().numpy() for ids, length in zip(batch["input_ids"], lengths, strict=True)]
        room = self.limits.room(max(lengths))
        with plain_generation(self.model):
            return continuations(self.model, prompts, self.limits.ends, room, in_step=in_step(self.trainer.strategy))


class AnswerShards(TableShards):
    """The generated tokens of a shard's prompts as one Parquet file, keyed by row."""

    def write(self, index: int, parts: Sequence[tuple[torch.Tensor, Any]]) -> None:
        rows = torch.cat([rows for rows, _ in parts]).cpu().numpy()
        tokens = [np.array(found, dtype=np.int32) for _, prediction in parts for found in prediction]
        columns = {"row": rows, "tokens": ragged(np.concatenate(tokens), np.array([len(found) for found in tokens]))}
        write_shard(pa.table(columns), self.directory, index)


def run_answer_pass(
    model: PreTrainedModel | ModelRecipe,
    prompts: Mapping[int, NDArray[np.int32]],
    limits: AnswerLimits,
    directory: Path,
    *,
    resources: Resources,
    title: str = "generate",
) -> float:
    """Greedy continuation of each prompt ``[prompt]``; `read_answers` reads them.

    Batches go around all devices; those that an earlier attempt left in the directory are kept. Where all processes
    hold parts of one model, each goes on until the others have their answers too.

    Returns:
        Seconds over all attempts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plan = plan_answers({row: len(prompt) for row, prompt in prompts.items()}, limits)
    records = {row: TokenSequence(prompt, np.zeros(len(prompt), dtype=np.uint8)) for row, prompt in prompts.items()}
    return run_sharded_pass(
        AnswerPass(model, limits), records, plan, AnswerShards(directory), directory,
        resources=resources, title=title, unit="answers",
    )  # fmt: skip


def read_answers(
    directory: Path,
    prompts: Mapping[int, NDArray[np.int32]],
    limits: AnswerLimits,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[int, str]:
    """Row to answer text that `run_answer_pass` generated; empty where the prompt leaves the model no room."""
    answers = dict.fromkeys(prompts, "")
    for shard in plan_answers({row: len(prompt) for row, prompt in prompts.items()}, limits):
        table = pq.read_table(shard_path(directory, shard.index))
        for row, tokens in zip(table["row"].to_pylist(), table["tokens"].to_pylist(), strict=True):
            answers[row] = finish(tokens, tokenizer, limits.ends, limits.stop)
    return answers


def plan_answers(lengths: Mapping[int, int], limits: AnswerLimits) -> list[Shard]:
    """Rows to generate together, a shard for each batch, longest prompts first; those without room are left out.

    Prompts without room for ``max_new_tokens`` are alone, so that they do not shorten the answers of others.
    """
    order = sorted((row for row in lengths if limits.room(lengths[row])), key=lambda row: (-lengths[row], row))
    tight = [row for row in order if limits.room(lengths[row]) < limits.max_new_tokens]
    groups = [[row] for row in tight]
    groups += [order[start : start + BATCH] for start in range(len(tight), len(order), BATCH)]
    return [Shard(place, (tuple(rows),), sum(lengths[row] for row in rows)) for place, rows in enumerate(groups)]


def continuations(
    model: PreTrainedModel,
    prompts: Sequence[NDArray[np.int32]],
    ends: Sequence[int],
    max_new_tokens: int,
    *,
    in_step: bool = False,
) -> list[list[int]]:
    """Greedily generated token ids after each prompt; ``in_step`` goes on until all processes have theirs."""
    pad = ends[0] if ends else 0
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for line, prompt in enumerate(prompts):  # padding on the left: generation goes on from the last column
        input_ids[line, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[line, width - len(prompt) :] = 1
    generate: Any = model.generate
    output = generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        synced_gpus=in_step,
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

    with torch.inference_mode(), plain_generation(model):
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
