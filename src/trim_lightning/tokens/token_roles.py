"""Which role each token of a rendered text has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from trim_lightning.errors import UserError
from trim_lightning.tokens.spans import SCAFFOLD

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


_SPACE_MARKS = "▁Ġ"  # how SentencePiece and byte-level vocabularies write a space


def _flat(rows: Sequence[Sequence[tuple[int, ...]]], width: int) -> np.ndarray:
    """Lay lists of tuples end to end as one int64 array ``[tuples, width]``."""
    numbers = chain.from_iterable(chain.from_iterable(rows))
    return np.fromiter(numbers, np.int64, width * sum(map(len, rows))).reshape(-1, width)


def _roles_of(ranges: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Return the role of each character range by the first span it touches.

    Args:
        ranges: ``[tokens, 2]``, start and end of each token.
        spans: ``[spans, 3]``, start, end and role, in order and apart.

    Returns:
        uint8 ``[tokens]``; `SCAFFOLD` where no span is touched or the range is empty.
    """
    starts, ends = ranges[:, 0], ranges[:, 1]
    # the first span that is not over where the token starts
    first = np.searchsorted(spans[:, 1], starts, side="right")
    beyond = [np.iinfo(np.int64).max, np.iinfo(np.int64).max, SCAFFOLD]
    touched = np.vstack([spans, beyond])[first]
    return np.where((touched[:, 0] < ends) & (starts < ends), touched[:, 2], SCAFFOLD).astype(np.uint8)


def _untrimmed_copy(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Copy the tokenizer's engine, without padding, cutting, and the trimming of white space from offsets.

    The original is left alone: others may pad or cut with it.
    """
    backend = tokenizer.backend_tokenizer
    try:
        config = json.loads(backend.to_str())
    except Exception as error:  # the engine raises a bare Exception for parts written in Python
        raise UserError(
            f"tokenizer {_name(tokenizer)}: it cannot be copied ({_one_line(error)}); use a model with a tokenizer.json"
        ) from None
    config["padding"] = config["truncation"] = None
    for processor in _processors(config["post_processor"]):
        if "trim_offsets" in processor:
            processor["trim_offsets"] = False
    copied: Tokenizer = type(backend).from_str(json.dumps(config))
    copied.encode_special_tokens = tokenizer.split_special_tokens
    return copied


def _processors(config: dict[str, Any] | None) -> list[dict[str, Any]]:
    if config is None:
        return []
    return [config, *chain.from_iterable(_processors(inner) for inner in config.get("processors", []))]


def _token_tables(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Return bool ``[vocabulary]`` twice: is the token special; is it made of space marks only."""
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    special = [*tokenizer.all_special_ids, *(place for place, token in added.items() if token.special)]
    space = [place for token, place in vocabulary.items() if token and not token.strip(_SPACE_MARKS)]
    size = 1 + max((*vocabulary.values(), *special))
    tables = np.zeros((2, size), dtype=bool)
    tables[0, special] = True
    tables[1, space] = True
    return tables[0], tables[1]


def _eos_to_append(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> int | None:
    """Return the end-of-sequence id, or None if there is none or the tokenizer appends it by itself."""
    eos = tokenizer.eos_token_id
    return None if eos is None or backend.encode("").ids[-1:] == [eos] else eos


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
