"""The two forward passes as LightningModules: over the targets with saliency, over the pool without."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from trim_lightning.engine.memory import in_halves, is_out_of_memory
from trim_lightning.engine.response_learning import alignments, gradients_of, mean_states, predicted_responses
from trim_lightning.engine.shards import write_tensors
from trim_lightning.files.atomic import write_atomically
from trim_lightning.models.divided import mesh_of
from trim_lightning.models.load import ModelRecipe
from trim_lightning.models.loss import last_hidden_states, token_probabilities
from trim_lightning.models.prefix import can_resume, states_after
from trim_lightning.models.reading import read, reading_of, refuse_divided
from trim_lightning.tokens.tokenized import TokenSequence, scope_mask
from trim_lightning.trim.alignment import HeadGradient
from trim_lightning.trim.fingerprints import FingerprintBank, class_states, unit
from trim_lightning.trim.matching import Matcher

log = logging.getLogger(__name__)


class ForwardPass(LightningModule):
    """A pass of one model over records.

    Args:
        model: The model, or the recipe by which each process of a spread pass loads its own.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel | ModelRecipe) -> None:
        super().__init__()
        self._recipe: ModelRecipe | None = None
        if isinstance(model, ModelRecipe):
            self._recipe = model
        elif getattr(model, "hf_device_map", None) is not None:
            self.__dict__["model"] = model  # spread over devices by accelerate: Lightning must not move it
        else:
            self.model = model

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        """`on_batch`, in halves where memory does not suffice for the whole."""
        if self._trainer is not None and in_step(self._trainer.strategy):
            return self.on_batch(batch)  # the other processes count on one call
        return in_halves(self.on_batch, batch)

    def on_batch(self, batch: Mapping[str, Any]) -> Any:
        """The results of one batch."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Load the model in the process that runs it, and divide its weights if the strategy does that."""
        if self._recipe is None:
            return
        strategy = self.trainer.strategy
        mesh = mesh_of(strategy.root_device, self.trainer.world_size) if in_step(strategy) else None
        self.model, self._recipe = self._recipe.load(mesh), None


def in_step(strategy: Strategy) -> bool:
    """True if the processes hold parts of one model's weights, so that all must call it equally often."""
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


class TargetPass(ForwardPass):
    """One forward over the target set that reads attention in every layer that has softmax attention.

    ``predict_step`` returns, for each record of the batch, ``row``, ``token_ids [seq]``, ``roles [seq]``,
    ``row_signal [layers, seq]``, ``column_signal [layers, seq]``, ``probability [seq]`` (of the token after those
    before it) and ``hidden [seq, hidden]`` (float32), so that any number of layers, weighting and scope is arithmetic
    afterwards.

    Args:
        model: See `ForwardPass`.
        note: File that gets the model's `Reading` as JSON.
    """

    def __init__(self, model: PreTrainedModel | ModelRecipe, note: Path | None = None) -> None:
        super().__init__(model)
        self.note = note

    def on_predict_start(self) -> None:
        """Let the first process note how attention is read: the one that started it has no model."""
        if self.note is not None and self.trainer.is_global_zero:
            write_atomically(self.note, json.dumps(asdict(reading_of(self.model))))

    def on_batch(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        shared = self._trainer is not None and in_step(self._trainer.strategy)
        if shared:
            refuse_divided(reading_of(self.model).way, type(self.model).__name__)
        hidden, row_signals, column_signals = read(self.model, batch["input_ids"], batch["lengths"])
        probabilities = token_probabilities(self.model, batch["input_ids"], hidden, together=shared)
        results = []
        for line, length in enumerate(batch["lengths"].tolist()):
            results.append(
                {
                    "row": int(batch["rows"][line]),
                    "token_ids": batch["input_ids"][line, :length].int().cpu(),
                    "roles": batch["roles"][line, :length].cpu(),
                    "row_signal": row_signals[:, line, :length].cpu(),
                    "column_signal": column_signals[:, line, :length].cpu(),
                    "probability": probabilities[line, :length].cpu(),
                    "hidden": hidden[line, :length].float().cpu(),
                }
            )
        return results


class ScoringPass(ForwardPass):
    """One forward over the pool that matches every token with every bank; attention is not read.

    ``predict_step`` returns flat tensors over the batch's real tokens: ``rows [batch]``, ``lengths [batch]``,
    ``token_ids [tokens]``, ``roles [tokens]``, ``similarity [banks, tokens]`` (raw cosines) and, for a bank with
    ``fallback.nearest=hidden``, ``match/<place> [tokens]`` (ids of the matched classes); `match_of` gives them of each.
    Where errors are wanted there is ``error/<scope> [tokens]`` float16 too: 1 - p of each token after those before it,
    0 of a record's first token and of what is outside the scope. Where targets are given there are ``alignment
    [targets, tokens]`` float32, see `trim_lightning.engine.response_learning`, 0 outside responses, and with states
    ``mean_state [hidden, batch]`` float16 of each response.

    Args:
        model: See `ForwardPass`.
        banks: Each bank with its ``fallback.nearest``.
        tables: Files that get the table of matches of some banks, by their places.
        share_prefixes: Compute what all records of a batch begin with once, where that pays and the model can do it.
        error_scopes: Scopes whose tokens' errors are wanted.
        targets: Groups of targets whose responses those of the pool are held against.
        states: Keep the mean state of each response too.
    """

    def __init__(
        self,
        model: PreTrainedModel | ModelRecipe,
        banks: Sequence[tuple[FingerprintBank, str]],
        tables: Mapping[Path, Sequence[int]] | None = None,
        share_prefixes: bool = False,
        error_scopes: Sequence[str] = (),
        targets: Sequence[Sequence[TokenSequence]] = (),
        states: bool = False,
    ) -> None:
        super().__init__(model)
        self.targets, self.keeps_states = list(targets), states
        self.share_prefixes = share_prefixes
        self.error_scopes = tuple(sorted(set(error_scopes)))
        self._resumes: bool | None = None  # whether the model can; asked where it is wanted
        self.banks = list(banks)
        self.tables = dict(tables or {})
        self._matchers: list[Matcher] = []
        self._gradients: list[HeadGradient] = []

    def on_predict_start(self) -> None:
        """Prepare banks and targets on the model's device: the fallback table is computed once per vocabulary."""
        layer: Any = self.model.get_input_embeddings()
        embeddings = layer.weight.detach()
        if hasattr(embeddings, "full_tensor"):  # divided among processes
            embeddings = embeddings.full_tensor()
        self._matchers = [Matcher.prepare(bank, embeddings, nearest) for bank, nearest in self.banks]
        self._gradients = gradients_of(self.model, self.targets, self._together)
        if self.tables and self.trainer.is_global_zero:  # the process that started this one has no embeddings
            for path, places in self.tables.items():
                classes = torch.stack([self._matchers[place].classes for place in places])
                write_tensors(path, {"match": classes.int().cpu().numpy()})

    def on_batch(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        input_ids, lengths = batch["input_ids"], batch["lengths"]
        real = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
        # before the forward pass: a GPU would be waited for after it
        places = real.flatten().nonzero().squeeze(1)
        scopes = {scope: scope_mask(batch["roles"].cpu().numpy(), scope) for scope in self.error_scopes}
        hidden = self.states(input_ids, batch.get("prefix", 0))
        token_ids = input_ids.flatten()[places]
        states = {
            token_class: unit(class_states(hidden, token_class).flatten(0, 1)[places])
            for token_class in {bank.token_class for bank, _ in self.banks}
        }
        matched = [
            matcher.match(token_ids, states[bank.token_class])
            for matcher, (bank, _) in zip(self._matchers, self.banks, strict=True)
        ]
        errors = {
            f"error/{scope}": self.errors(input_ids, hidden, wanted).flatten()[places]
            for scope, wanted in scopes.items()
        }
        learnt: dict[str, Tensor] = {}
        if self._gradients:
            counted = predicted_responses(batch["roles"])
            aligned = alignments(self.model, input_ids, hidden, counted, self._gradients, self._together)
            learnt["alignment"] = aligned.flatten(1)[:, places]
            if self.keeps_states:
                learnt["mean_state"] = mean_states(hidden, counted)
        return {
            "rows": batch["rows"],
            "lengths": lengths,
            "token_ids": token_ids,
            "roles": batch["roles"].flatten()[places],
            "similarity": torch.stack([similarity for similarity, _ in matched]),
            **{
                f"match/{place}": classes
                for place, (matcher, (_, classes)) in enumerate(zip(self._matchers, matched, strict=True))
                if matcher.nearest == "hidden"
            },
            **errors,
            **learnt,
        }

    @property
    def _together(self) -> bool:
        """True if other processes count on one call for each batch."""
        return self._trainer is not None and in_step(self._trainer.strategy)

    def errors(self, input_ids: Tensor, hidden: Tensor, scope: NDArray[np.bool_]) -> Tensor:
        """``[batch, seq]`` float16 1 - p of the tokens in a scope ``[batch, seq]``, 0 of the others and of first ones.

        Each scope by itself, so that it has the same bytes whatever else shares the pass.
        """
        wanted = torch.from_numpy(scope).to(hidden.device)
        probability = token_probabilities(self.model, input_ids, hidden, self._together, wanted)
        return (1 - probability).nan_to_num(0.0).half()

    def states(self, input_ids: Tensor, prefix: int) -> Tensor:
        """Last hidden states ``[batch, seq, hidden]`` of records that all begin with ``prefix`` equal tokens."""
        shared = prefix > 0 and self.share_prefixes
        if self._together:
            shared = False
        if shared and self._resumes is None:
            self._resumes = can_resume(self.model)
        if shared and self._resumes:
            try:
                return states_after(self.model, input_ids, prefix)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # out of the handler, whose exception holds the keys and values
            log.warning("keys and values of a batch did not fit into memory: prefixes are computed for each record")
            self._resumes = False
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return last_hidden_states(self.model, input_ids)

    @property
    def shares(self) -> bool:
        """False if prefixes are not shared, or this process has found that its model cannot."""
        return self.share_prefixes and self._resumes is not False

    def match_of(self, result: Mapping[str, Tensor], place: int) -> Tensor:
        """``[tokens]`` ids of the classes that the bank at a place matched a result's tokens with, on their device."""
        asked = result.get(f"match/{place}")
        return (
            self._matchers[place].classes.to(result["token_ids"].device)[result["token_ids"]]
            if asked is None
            else asked
        )
