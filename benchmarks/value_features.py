"""One forward pass over pool and targets that keeps what every candidate formula needs of the response tokens.

With it a formula is arithmetic of seconds, so that dozens can be tried on the same pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import materials
from trim_lightning.engine.batches import ShardBatches, plan_shards
from trim_lightning.engine.modules import TargetPass
from trim_lightning.models.load import load_model
from trim_lightning.models.loss import last_hidden_states
from trim_lightning.models.precision import resolve_dtype
from trim_lightning.tokens.spans import RESPONSE
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.trim.saliency import token_saliency

TOKENS_PER_BATCH = 4_096
LAYERS = 6  # whose attention is read, as saliency=trim does


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of some records, record after record; y_k is a token, h_k the state that predicts it.

    Attributes:
        offsets: ``[records + 1]`` where each record's tokens begin.
        token_ids: ``[tokens]`` y_k.
        predicting: ``[tokens, hidden]`` float16, h_k: last hidden state one place before the token.
        own: ``[tokens, hidden]`` float16, last hidden state at the token itself, which TRIM matches.
        gradient: ``[tokens, hidden]`` float16, g_k = W^T (onehot(y_k) - p_k), W the output embedding.
        probability: ``[tokens]`` float32, p(y_k).
        attention: ``[tokens]`` float32, TRIM's saliency; NaN where attention was not read.
    """

    offsets: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    predicting: NDArray[np.float16]
    own: NDArray[np.float16]
    gradient: NDArray[np.float16]
    probability: NDArray[np.float32]
    attention: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``[records]`` response tokens."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> NDArray[np.int64]:
        """``[tokens]`` the record of each token."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: NDArray[np.int64]) -> ResponseTokens:
        """Those of some records, in the given order."""
        places = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        arrays = {name: getattr(self, name)[places] for name in ARRAYS}
        return ResponseTokens(offsets=offsets, **arrays)

    def save(self, directory: Path) -> None:
        """One file an array, so that they can be mapped."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("offsets", *ARRAYS):
            np.save(directory / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, directory: Path) -> ResponseTokens:
        """Map what `save` wrote."""
        return cls(**{name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("offsets", *ARRAYS)})


SECONDS = "seconds"
ARRAYS = ("token_ids", "predicting", "own", "gradient", "probability", "attention")


def response_tokens(records: TokenizedRecords, directory: Path, *, attention: bool) -> ResponseTokens:
    """The pass, or what it left in the directory.

    Args:
        records: Pool or targets.
        directory: Where it is kept.
        attention: Read attention too, for TRIM's saliency; records are then few.
    """
    if not (directory / "attention.npy").exists():
        model = load_model(materials.smollm2(), resolve_dtype("auto"))
        started = time.perf_counter()
        found = dict(walk(model, records, attention))
        seconds = time.perf_counter() - started
        parts = [found[row] for row in range(len(records))]
        lengths = [len(part["token_ids"]) for part in parts]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in ARRAYS}
        ResponseTokens(offsets=np.concatenate([[0], np.cumsum(lengths)]), **arrays).save(directory)
        (directory / SECONDS).write_text(f"{seconds:.1f}\n")
    return ResponseTokens.load(directory)


def pass_seconds(directory: Path) -> float:
    """What the pass took."""
    return float((directory / SECONDS).read_text())


@torch.inference_mode()
def walk(model: Any, records: TokenizedRecords, attention: bool) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """Row and arrays of every record, in the order of the batches."""
    weight: Tensor = model.get_output_embeddings().weight
    watching = TargetPass(model)
    batches = ShardBatches(records, plan_shards(records.lengths, TOKENS_PER_BATCH), "response")
    for number in range(len(batches)):
        batch = batches[number]
        hidden = last_hidden_states(model, batch["input_ids"])
        signals = {found["row"]: found for found in watching.on_batch(batch)} if attention else {}
        for line, row in enumerate(batch["rows"].tolist()):
            length = int(batch["lengths"][line])
            mask = batch["roles"][line, :length] == RESPONSE
            mask[0] = False  # nothing predicts a sequence's first token
            places = mask.nonzero().squeeze(1)
            following = batch["input_ids"][line, places]
            predicting = hidden[line, places - 1]
            saliency = torch.full((len(places),), float("nan"))
            if attention and len(places):
                own = signals[row]
                saliency = token_saliency(own["row_signal"], own["column_signal"], mask, num_layers=LAYERS)[2]
            gradient, probability = errors(predicting, following, weight)
            yield (
                row,
                {
                    "token_ids": following.numpy(),
                    "predicting": predicting.half().numpy(),
                    "own": hidden[line, places].half().numpy(),
                    "gradient": gradient.half().numpy(),
                    "probability": probability.numpy(),
                    "attention": saliency.numpy(),
                },
            )


def errors(states: Tensor, following: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``g [tokens, hidden]`` and ``p(y) [tokens]`` of predictions from ``[tokens, hidden]`` states."""
    expected, probability = [], []
    for piece, answer in zip(states.split(512), following.split(512), strict=True):
        chances = torch.softmax((piece @ weight.T).float(), dim=-1)
        probability.append(chances.gather(1, answer[:, None]).squeeze(1))
        expected.append((chances.to(weight.dtype) @ weight).float())
    if not expected:
        return torch.empty(0, weight.shape[1]), torch.empty(0)
    return weight[following].float() - torch.cat(expected), torch.cat(probability)
