"""Held-out records in the forms that evaluation meets, and an independent reading of the tiny models' chat form."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tiny_models import END, START
from trim_lightning.engine.devices import Resources
from trim_lightning.engine.response_loss import read_losses, run_loss_pass
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile
from trim_lightning.records.sources import sha256_of
from trim_lightning.tokens.rendering import ChatRenderer
from trim_lightning.tokens.tokenized import TokenizedRecords, tokenize_records

Turns = Sequence[tuple[str, str]]  # role and content


class Plain:
    """A tiny model as plain transformers loads it, in float64, and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)

    def encode(self, turns: Turns) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them hold a character of an assistant's text.

        The text is put together by hand, and tokens are found by their character offsets.
        """
        text, marks = "", []
        for role, content in turns:
            text += f"{START}{role}\n"
            if role == "assistant":
                marks.append((len(text), len(text) + len(content)))
            text += f"{content}{END}\n"
        found = self.tokenizer(text, return_offsets_mapping=True)
        holds = [any(low < end and start < high for low, high in marks) for start, end in found["offset_mapping"]]
        return found["input_ids"], holds

    def loss(self, ids: Sequence[int], counted: Sequence[bool]) -> float:
        """Summed nats of the counted tokens, one token at a time."""
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0]
        total = 0.0
        for place in range(1, len(ids)):
            if counted[place]:
                scores = logits[place - 1]
                total += float(torch.logsumexp(scores, 0) - scores[ids[place]])
        return total

    def greedy(self, ids: Sequence[int], ends: Sequence[int], most: int) -> list[int]:
        """Continue with the likeliest token, the whole sequence anew for every token."""
        found: list[int] = []
        while len(found) < most:
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([[*ids, *found]])).logits[0, -1]
            best = int(logits.argmax())
            if best in ends:
                break
            found.append(best)
        return found


@pytest.fixture
def plain(tiny_folder: Callable[[str], Path]) -> Callable[[str], Plain]:
    """Loads a tiny model plainly."""
    return lambda architecture: Plain(tiny_folder(architecture))


Opened = tuple[RecordFile, TokenizedRecords, ChatRenderer]


@pytest.fixture
def opened(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Callable[..., Opened]:
    """``opened(records, max_length=…)``: records as JSON lines, read and tokenised as the product does."""

    def build(records: Sequence[dict[str, Any]], max_length: int = 400, architecture: str = "llama") -> Opened:
        folder = tmp_path / f"records{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        path = folder / "held_out.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        source = LineSource(path, str(path), path.name, "evaluation", sha256_of(path, "x"))
        file = index(source, ReadOptions())
        renderer = ChatRenderer(AutoTokenizer.from_pretrained(tiny_folder(architecture)))
        tokenize_records(file, renderer, max_length, folder)
        return file, TokenizedRecords(folder), renderer

    return build


CPU = {"accelerator": "cpu"}


def response_losses(model: PreTrainedModel, tokens: TokenizedRecords, tokens_per_batch: int) -> NDArray[np.float64]:
    """Summed response losses as the product computes them, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        run_loss_pass(model, tokens, Path(folder), resources=Resources(CPU, tokens_per_batch))
        return read_losses(Path(folder), tokens)


def varied_pairs(number: int) -> list[dict[str, str]]:
    """Records of very different prompt and response lengths."""
    words = [
        "train",
        "leaves",
        "Vienna",
        "before",
        "sunrise;",
        "how",
        "many",
        "eggs,",
        "12",
        "or",
        "21?",
        "naïve",
        "漢字",
    ]
    draw = np.random.default_rng(5)
    return [
        {
            "id": f"r{row}",
            "prompt": " ".join(draw.choice(words, 1 + 7 * row % 23)),
            "response": " ".join(draw.choice(words, 1 + 5 * row % 17)),
        }
        for row in range(number)
    ]
