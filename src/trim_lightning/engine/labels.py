"""Which tokens a model is trained on, and judged by: the response and its end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trim_lightning.models.loss import IGNORED
from trim_lightning.tokens.spans import RESPONSE, SCAFFOLD
from trim_lightning.tokens.tokenized import TokenizedRecords, TokenSequence


def labels_of(sequence: TokenSequence, with_end: bool = True) -> NDArray[np.int64]:
    """Labels ``[tokens]``: response tokens and the token that ends each response, else `IGNORED`.

    The token after the last response token is the template's end of turn; without it a model never learns to
    stop (our choice). It is trained, but no part of a held-out loss (``with_end=False``).
    """
    response = sequence.roles == RESPONSE
    if not with_end:
        return np.where(response, sequence.token_ids, IGNORED).astype(np.int64)
    ends = np.zeros_like(response)
    ends[1:] = response[:-1] & (sequence.roles[1:] == SCAFFOLD)
    return np.where(response | ends, sequence.token_ids, IGNORED).astype(np.int64)


def collate(records: TokenizedRecords, rows: Sequence[int], pad_token_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of some records, each ``[batch, seq]`` int64, padded on the right."""
    sequences = [records[row] for row in rows]
    width = max(len(sequence.token_ids) for sequence in sequences)
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for line, sequence in enumerate(sequences):
        input_ids[line, : len(sequence.token_ids)] = sequence.token_ids
        labels[line, : len(sequence.token_ids)] = labels_of(sequence)
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


def trained_labels(input_ids: Tensor, roles: Tensor, lengths: Tensor) -> Tensor:
    """Labels ``[batch, seq]`` of a padded batch as `labels_of` gives them for a record.

    ``input_ids`` and ``roles`` are ``[batch, seq]``, the latter 0 at padding, and ``lengths`` is ``[batch]``.
    """
    response = roles == RESPONSE
    real = torch.arange(roles.shape[1], device=roles.device) < lengths[:, None]
    ends = torch.zeros_like(response)
    ends[:, 1:] = response[:, :-1] & (roles[:, 1:] == SCAFFOLD) & real[:, 1:]
    return torch.where(response | ends, input_ids, IGNORED)
