"""Greedy answers to held-out prompts, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from trim_lightning.progress import progress_bar
from trim_lightning.tokens.tokenized import TokenizedRecords, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 16  # prompts generated together


def prompt_of(sequence: TokenSequence) -> NDArray[np.int32]:
    """Tokens before the last response, exactly as the model saw them in training.

    Returns:
        ``[prompt]`` int32; the whole sequence if it has no response.
    """
    response = np.flatnonzero(sequence.roles == 2)
    if not len(response):
        return sequence.token_ids
    gaps = np.flatnonzero(np.diff(response) > 1)
    return sequence.token_ids[: response[gaps[-1] + 1] if len(gaps) else response[0]]


def end_tokens(records: TokenizedRecords, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: EOS, and the special token that the template puts behind a response."""
    ends = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for row in range(min(len(records), 50)):
        sequence = records[row]
        response = np.flatnonzero(sequence.roles == 2)
        if len(response) and response[-1] + 1 < len(sequence.token_ids):
            following = int(sequence.token_ids[response[-1] + 1])
            if following in special:
                ends.add(following)
    return sorted(ends)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: TokenizedRecords,
    rows: Sequence[int],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    title: str = "generate",
) -> dict[int, str]:
    """Greedy continuation of each record's prompt.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        records: Tokenised held-out records.
        rows: Which of them to answer.
        max_new_tokens: Longest answer.
        stop: Texts at which an answer is cut, besides the end of turn.
        title: Name on the progress bar.

    Returns:
        Row to answer text.
    """
    ends = end_tokens(records, tokenizer)
    prompts = {row: prompt_of(records[row]) for row in rows if records.lengths[row]}
    order = sorted(prompts, key=lambda row: (-len(prompts[row]), row))
    answers: dict[int, str] = {}
    pad = ends[0] if ends else 0
    generate: Any = model.generate
    with progress_bar(title, total=len(order), unit="answers") as bar, torch.inference_mode():
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            width = max(len(prompts[row]) for row in part)
            input_ids = torch.full((len(part), width), pad, dtype=torch.int64)
            mask = torch.zeros_like(input_ids)
            for line, row in enumerate(part):  # padding on the left: generation goes on from the last column
                input_ids[line, width - len(prompts[row]) :] = torch.from_numpy(prompts[row].astype(np.int64))
                mask[line, width - len(prompts[row]) :] = 1
            output = generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends or None,
                pad_token_id=pad,
                use_cache=True,
            )
            for line, row in enumerate(part):
                answers[row] = finish(output[line, width:].tolist(), tokenizer, ends, stop)
            bar.update(len(part))
    return answers


def finish(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], stop: Sequence[str]) -> str:
    """Cut generated tokens at the first end token and the text at the first stop text."""
    first_end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    text = str(tokenizer.decode(list(tokens[:first_end]), skip_special_tokens=True))
    for mark in stop:
        text = text.split(mark, 1)[0]
    return text
