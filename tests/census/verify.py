"""One class through the product, and through its own eager attention in float64."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from census.tiny_classes import tiny_model
from reference.reference import Array, Settings, Tokens, build_bank, match, pool, scale, scoped_places, tokenize, unit
from tiny_models import build_tiny_tokenizer, write_records
from trim_lightning.api import TrimScorer
from trim_lightning.engine.gradients import record_gradients
from trim_lightning.errors import UserError
from trim_lightning.models.load import load_model, load_tokenizer
from trim_lightning.models.lora import add_lora, lora_facts
from trim_lightning.models.loss import IGNORED, summed_loss
from trim_lightning.models.reading import NONE, Reading, read, reading_of
from trim_lightning.models.source import find_model
from trim_lightning.settings.schema import ModelSettings, SaliencySettings, WarmupSettings
from trim_lightning.store import Store

TOLERANCE = 2e-4
ROUNDING_GROWS = {"dory"}  # its normed loops make of a float32's last digit the third one of a state
SETTINGS = Settings(max_length=64, num_layers=2)


@dataclass
class Verdict:
    """What came of a class.

    Attributes:
        model_type: As in a config.
        name: The class.
        attention: Name of the attention function that runs.
        reading: How its attention is read.
        refused: Why it is refused; empty otherwise.
        unbuilt: Why it could not be built small; empty otherwise.
        differences: Largest difference from the eager reference, by what was compared.
        lora: What LoRA trained, or why it trains nothing.
        less: Why no gradients of single records can be had; empty otherwise.
    """

    model_type: str
    name: str = ""
    attention: str = ""
    reading: Reading | None = None
    refused: str = ""
    unbuilt: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    lora: str = ""
    trained: bool = False
    less: str = ""

    @property
    def wrong(self) -> bool:
        """True if a number is not the model's own."""
        tolerance = TOLERANCE * (10 if self.model_type in ROUNDING_GROWS else 1)
        return any(not value <= tolerance for value in self.differences.values())

    @property
    def selects(self) -> bool:
        """True if TRIM selects with it, by its attention."""
        return (
            not (self.unbuilt or self.refused or self.wrong) and self.reading is not None and self.reading.way != NONE
        )


class Eager:
    """The class as transformers loads it, in float64 and with eager attention; nothing of the product in it."""

    def __init__(self, folder: Path) -> None:
        self.model = self._load(folder, torch.float64)
        if self.model.config.model_type in ROUNDING_GROWS or not self._runs():
            self.model = self._load(folder, torch.float32)
        weight = self.model.get_input_embeddings().weight.detach().double().numpy()
        self.embeddings = np.stack([unit(row) for row in weight])

    def _runs(self) -> bool:
        try:
            self.forward([3, 4, 5])
        except RuntimeError:  # a class with constants in float32
            return False
        return True

    def _load(self, folder: Path, dtype: torch.dtype) -> Any:
        eager: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": dtype}
        try:
            return AutoModelForCausalLM.from_pretrained(folder, **eager).eval()
        except ValueError:  # no causal class, but one for images and texts
            return AutoModelForImageTextToText.from_pretrained(folder, **eager).eval()

    def forward(self, ids: list[int]) -> tuple[Array, list[Array]]:
        """Last hidden states `[seq, hidden]` and the weights `[heads, seq, seq]` of each layer that gives some."""
        base = self.model.base_model if self.model.base_model is not self.model else self.model.model
        with torch.no_grad():
            output = base(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False)
        size = (len(ids), len(ids))
        square = [
            each for each in getattr(output, "attentions", None) or () if each is not None and each.shape[2:] == size
        ]
        return output.last_hidden_state[0].double().numpy(), [each[0].double().numpy() for each in square]


def signals(weights: Array) -> tuple[Array, Array]:
    """Row and column signal of one layer's weights `[heads, seq, seq]`; what a row gives to no token is dropped."""
    seen = weights > 0
    weights = weights / weights.sum(-1, keepdims=True)
    size = seen.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(seen, weights * np.log(weights), 0).sum(-1)
        row = np.where(size > 1, 1 - entropy / np.log(np.maximum(size, 2)), 0)
    return row.mean(0), (weights.sum(1) / np.maximum(seen.sum(1), 1)).mean(0)


def saliency(tokens: Tokens, rows: list[Array], columns: list[Array]) -> Array:
    """The saliency `[seq]` of the scoped tokens, NaN elsewhere; 1 without signals."""
    places = scoped_places(tokens, SETTINGS.scope)
    alpha = np.full(len(tokens.ids), np.nan)
    alpha[places] = 1.0
    if rows:
        row, column = (np.mean(each[-SETTINGS.num_layers :], axis=0)[places] for each in (rows, columns))
        alpha[places] = np.maximum(1e-6, 0.5 * scale(row, "minmax") + 0.5 * scale(column, "minmax"))
    return alpha


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A model folder with the tiny tokenizer."""
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> TrimScorer:
    """The scorer as the product loads it."""
    source = find_model(ModelSettings(path=str(folder)), Store(folder.parent / "store"))
    return TrimScorer(load_model(source, torch.float32), load_tokenizer(source), max_length=SETTINGS.max_length)


def verify(model_type: str, work: Path, seed: int = 0) -> Verdict:
    """Build, save, load, compare and train a class; what a user would see as an error is its verdict."""
    verdict, folder = Verdict(model_type), work / model_type
    try:
        model = tiny_model(model_type, seed)
    except ImportError as error:
        library = re.search(r"requires the (\S+) library", str(error))
        assert library is not None
        verdict.unbuilt = f"transformers builds it with the library {library[1]}, which is not installed"
        return verdict
    except Exception as error:
        verdict.unbuilt = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return verdict
    verdict.name = type(model).__name__
    try:
        scorer = load(save(model, folder))
        verdict.name, verdict.reading = type(scorer.model).__name__, reading_of(scorer.model)
        verdict.attention = scorer.model.config._attn_implementation
        compare(verdict, scorer, folder, work)
        train(verdict, scorer.model)
    except UserError as error:
        verdict.refused = str(error).removeprefix(f"model.path={model_type}: ").removeprefix("model.path: ")
        assert "\n" not in verdict.refused
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return verdict


def compare(verdict: Verdict, scorer: TrimScorer, folder: Path, work: Path) -> None:
    """Signals, hidden states, fingerprints and scores, ours in padded batches, the reference's record by record."""
    eager, tokenizer, differences = Eager(folder), AutoTokenizer.from_pretrained(folder), verdict.differences
    targets = write_records(work / "targets.jsonl", 3, seed=2, edge_cases=False, response_words=(2, 20))
    records = write_records(work / "pool.jsonl", 5, seed=3, edge_cases=False)

    def encode(record: dict[str, str]) -> Tokens:
        return tokenize(tokenizer, record["prompt"], record["response"], SETTINGS.max_length)

    encoded = [encode(record) for record in targets]
    ids, lengths = padded([tokens.ids for tokens in encoded])
    with torch.inference_mode():
        hidden, rows, columns = read(scorer.model, ids, lengths)
    uniform, parts = len(rows) == 0, []
    for line, tokens in enumerate(encoded):
        length = len(tokens.ids)
        own_hidden, attention = eager.forward(tokens.ids)
        own = [] if uniform else [signals(each) for each in attention]
        own_rows, own_columns = [row for row, _ in own], [column for _, column in own]
        assert len(own) == len(rows), f"{verdict.name}: eager gives {len(own)} layers, the product {len(rows)}"
        if not uniform:
            note(differences, "row", rows[:, line, :length], np.stack(own_rows))
            note(differences, "column", columns[:, line, :length], np.stack(own_columns))
        directions = own_hidden / np.linalg.norm(own_hidden, axis=-1, keepdims=True)
        note(differences, "states", normalize(hidden[line, :length].float(), dim=-1), directions)
        parts.append((tokens, own_hidden, saliency(tokens, own_rows, own_columns)))
    bank = build_bank(parts)
    weight = 0.0 if uniform else 0.5
    ours = scorer.fingerprint(targets, SaliencySettings(SETTINGS.num_layers, weight, weight))
    assert ours.token_ids.tolist() == sorted(bank.vectors)
    note(differences, "fingerprints", ours.vectors, np.stack([bank.vectors[token] for token in sorted(bank.vectors)]))
    expected = [
        pool(match(tokens, eager.forward(tokens.ids)[0], bank, eager.embeddings, SETTINGS), SETTINGS).score
        for tokens in map(encode, records)
    ]
    note(differences, "scores", scorer.score(records, ours).score, np.array(expected))


def train(verdict: Verdict, model: PreTrainedModel) -> None:
    """LoRA as warm-up and fine-tuning add it: its gradients, and those of single records, against plain autograd."""
    settings = WarmupSettings()
    try:
        wrapped = add_lora(model, settings, seed=0)
    except UserError as error:
        verdict.lora = verdict.less = str(error)
        return
    verdict.lora = ", ".join(f"{number} {name}" for name, number in lora_facts(wrapped, settings)["modules"].items())
    inner: Any = wrapped.eval().get_base_model()
    weights = {name: weight for name, weight in inner.named_parameters() if weight.requires_grad}
    with torch.no_grad():  # B is 0 at first, and A would get no gradient
        for name, weight in weights.items():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    draw = torch.Generator().manual_seed(1)
    ids, _ = padded([torch.randint(3, 300, (length,), generator=draw).tolist() for length in (14, 9)])
    labels = ids.clone()
    labels[:, :4] = labels[1, 9:] = IGNORED
    own = []
    for line in range(2):
        logits = inner(input_ids=ids[line : line + 1], use_cache=False).logits.float()[0, :-1]
        own.append(cross_entropy(logits, labels[line, 1:], ignore_index=IGNORED, reduction="sum"))
    single = torch.autograd.grad(own[0] / 10, list(weights.values()), allow_unused=True, retain_graph=True)
    gradients = torch.autograd.grad(sum(own), list(weights.values()), allow_unused=True)
    ours = torch.autograd.grad(summed_loss(inner, ids, labels), list(weights.values()), allow_unused=True)
    largest = max(float(each.abs().max()) for each in gradients if each is not None)
    used = [(one, other) for one, other in zip(ours, gradients, strict=True) if one is not None and other is not None]
    assert largest > 0
    verdict.differences["training"] = max(float((one - other).abs().max()) for one, other in used) / largest
    verdict.trained = True
    found: dict[str, Tensor] = {}
    try:
        record_gradients(inner, ids, labels, lambda name, each: found.update({name: each[0]}))
    except UserError as error:
        verdict.less = str(error)
        return
    pairs = [
        (found[name], each) for name, each in zip(weights, single, strict=True) if each is not None and name in found
    ]
    assert pairs
    # a shared module collects one gradient for each time that it runs
    verdict.differences["less"] = max(float((one - other).abs().max()) for one, other in pairs) / (largest / 10)


def padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Sequences ``[batch, seq]``, padded on the right with an ordinary token, and their lengths."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.full((len(sequences), int(lengths.max())), 5)
    for line, sequence in enumerate(sequences):
        ids[line, : len(sequence)] = torch.tensor(sequence)
    return ids, lengths


def note(differences: dict[str, float], name: str, ours: Any, expected: Any) -> None:
    """Keep the largest difference under a name; what is no number differs by infinity."""
    found = float(np.abs(np.asarray(ours, dtype=float) - np.asarray(expected, dtype=float)).max())
    differences[name] = max(differences.get(name, 0.0), found if np.isfinite(found) else np.inf)
