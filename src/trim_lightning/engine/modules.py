"""The two forward passes as LightningModules: over the targets with saliency, over the pool without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from trim_lightning.errors import UserError
from trim_lightning.models.attention import SaliencyRecorder, recording
from trim_lightning.trim.fingerprints import FingerprintBank
from trim_lightning.trim.matching import Matcher


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Last hidden states ``[batch, seq, hidden]`` after the final norm, for ``[batch, seq]`` ids.

    Runs the base model without the LM head. There is no attention mask: with causal attention and padding
    on the right a real token never sees padding, and SDPA can take its fastest path.

    Raises:
        UserError: if the architecture has no base model beneath its LM head.
    """
    base: Any = model.base_model
    states: Tensor | None = getattr(base(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    if states is None:
        raise UserError(
            f"model.path: {type(model).__name__} gives no last hidden state to compare; use another architecture"
        )
    return states


class TargetPass(LightningModule):
    """One forward over the target set that reads attention in every layer.

    ``predict_step`` returns, for each record of the batch, ``row``, ``token_ids [seq]``, ``roles [seq]``,
    ``row_signal [layers, seq]``, ``column_signal [layers, seq]`` and ``hidden [seq, hidden]`` (float32), so that
    any number of layers, weighting and scope is arithmetic afterwards.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int) -> None:
        super().__init__()
        self.model = model
        self.num_layers = num_layers

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        recorder = SaliencyRecorder(batch["lengths"], self.num_layers)
        with recording(recorder):
            hidden = last_hidden_states(self.model, batch["input_ids"])
        row_signals, column_signals = recorder.signals()
        results = []
        for line, length in enumerate(batch["lengths"].tolist()):
            results.append(
                {
                    "row": int(batch["rows"][line]),
                    "token_ids": batch["input_ids"][line, :length].int().cpu(),
                    "roles": batch["roles"][line, :length].cpu(),
                    "row_signal": row_signals[:, line, :length].cpu(),
                    "column_signal": column_signals[:, line, :length].cpu(),
                    "hidden": hidden[line, :length].float().cpu(),
                }
            )
        return results


class ScoringPass(LightningModule):
    """One forward over the pool that matches every token with every bank; attention is not read.

    ``predict_step`` returns flat tensors over the batch's real tokens: ``rows [batch]``, ``lengths [batch]``,
    ``token_ids [tokens]``, ``scope [tokens]`` and for each bank ``similarity [banks, tokens]`` (raw cosines)
    and ``match [banks, tokens]`` (id of the matched class).
    """

    def __init__(self, model: PreTrainedModel, banks: Mapping[str, FingerprintBank], nearest: str) -> None:
        super().__init__()
        self.model = model
        self.banks = dict(banks)
        self.nearest = nearest
        self._matchers: list[Matcher] = []

    def on_predict_start(self) -> None:
        """Prepare the banks on the model's device: the fallback table is computed once per vocabulary."""
        layer: Any = self.model.get_input_embeddings()
        embeddings = layer.weight.detach()
        self._matchers = [Matcher.prepare(bank, embeddings, self.nearest) for bank in self.banks.values()]

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        input_ids, lengths = batch["input_ids"], batch["lengths"]
        hidden = last_hidden_states(self.model, input_ids)
        real = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
        token_ids, states = input_ids[real], hidden[real]
        matched = [matcher.match(token_ids, states) for matcher in self._matchers]
        return {
            "rows": batch["rows"],
            "lengths": lengths,
            "token_ids": token_ids,
            "scope": batch["scope"][real],
            "similarity": torch.stack([similarity for similarity, _ in matched]),
            "match": torch.stack([classes for _, classes in matched]),
        }
