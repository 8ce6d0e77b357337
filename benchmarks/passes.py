"""Passes that are compared: ours, the plain forward, and the common way."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import materials
from materials import WORK
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.scoring_pass import ScoringRequest, run_scoring_pass
from trim_lightning.models.loss import last_hidden_states
from trim_lightning.tokens.tokenized import TokenizedRecords

CPU = {"accelerator": "auto", "devices": 1}


BUDGET = 32_768 if torch.cuda.is_available() else 2048


def score(model: Any, records: TokenizedRecords, bank: Any = None, **options: Any) -> dict[str, Any]:
    """One whole scoring pass, into a directory that is thrown away; prefixes are shared where asked for.

    With a ``bank`` that alone is matched, else what the ``request`` among the options says.
    """
    resources = Resources(options.get("trainer", CPU), options.get("tokens_per_batch", BUDGET))
    directory = Path(tempfile.mkdtemp(dir=WORK))
    try:
        request = options.get("request") or ScoringRequest({"": bank}, "embedding", "all")
        shared = options.get("share_prefixes", False)
        return run_scoring_pass(model, records, {directory: request}, resources=resources, share_prefixes=shared)
    finally:
        shutil.rmtree(directory)


def forward_all(model: Any, batches: list[dict[str, Any]]) -> None:
    """The bare forward pass: the base model on ready batches, and nothing else."""
    with torch.inference_mode():
        for batch in batches:
            last_hidden_states(model, batch["input_ids"].to(model.device))


def one_by_one(model: Any, records: TokenizedRecords, rows: list[int], attentions: bool = True) -> None:
    """The common way: one record at a time, all attention matrices, all logits."""
    with torch.inference_mode():
        for row in rows:
            input_ids = torch.from_numpy(records[row].token_ids.astype(np.int64))[None].to(model.device)
            model(input_ids=input_ids, output_attentions=attentions, output_hidden_states=True)


def eager(dtype: torch.dtype) -> Any:
    """SmolLM2 as Hugging Face loads it for ``output_attentions=True``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(materials.smollm2().directory), dtype=dtype, attn_implementation="eager"
    )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def plain(dtype: torch.dtype) -> Any:
    """SmolLM2 as Hugging Face loads it by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(materials.smollm2().directory), dtype=dtype)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
