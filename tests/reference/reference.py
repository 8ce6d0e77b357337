"""The method again, as plainly as possible: one record at a time, float64, loops, eager attention.

Nothing here is shared with the package, so a wrong number there has no twin here. transformers itself
computes softmax, norms and rotary angles in float32 whatever the dtype, which leaves errors of about 1e-6.

Written from the method's description: entropy rows, attention received, their mean, fingerprints, the factor
0.9 and the pooled score are the paper's; scaling, scope, fallback variants and tie rules are our choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

Array = NDArray[np.float64]
ALPHA_FLOOR = 1e-6


@dataclass(frozen=True)
class Settings:
    """The keys that change a number; names and defaults follow the config."""

    max_length: int = 2048
    scope: str = "all"
    num_layers: int = 6
    row_weight: float = 0.5
    column_weight: float = 0.5
    normalize: str = "minmax"
    token_class: str = "own"
    fallback_mode: str = "scale"
    penalty: float = 0.9
    nearest: str = "embedding"
    pooler: str = "mean_max_coverage"
    mean_weight: float = 0.5
    max_weight: float = 0.5
    coverage_weight: float = 0.05
    fraction: float = 0.05


@dataclass(frozen=True)
class Tokens:
    """A rendered and cut record.

    Attributes:
        ids: Token classes, `[seq]`.
        kinds: What each token holds, `[seq]`: "prompt", "response", or None for scaffolding.
        truncated: Whether tokens were cut off.
    """

    ids: list[int]
    kinds: list[str | None]
    truncated: bool


@dataclass(frozen=True)
class Saliency:
    """Scaled signals and weights of one target, `[seq]` each, NaN outside the scope."""

    row: Array
    column: Array
    alpha: Array


@dataclass
class Bank:
    """Fingerprints by token class, and what they were made of.

    Attributes:
        vectors: Unit vectors `[hidden]`.
        idf: Inverse document frequency over the targets.
        mass: Sum of the weights over the occurrences, before normalising.
        count: Number of occurrences.
    """

    vectors: dict[int, Array] = field(default_factory=dict)
    idf: dict[int, float] = field(default_factory=dict)
    mass: dict[int, float] = field(default_factory=dict)
    count: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """Similarities of one record, `[seq]`: NaN (False) outside the scope."""

    similarity: Array
    direct: NDArray[np.bool_]


@dataclass(frozen=True)
class Pooled:
    """The scores of one record; all None if it has no scoped token."""

    score: float | None
    mean: float | None
    max: float | None
    coverage: float | None
    num_scored: int


# ---------------------------------------------------------------------------------------------- tokens


def byte_of_symbol() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, the other bytes for the code points from 256 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def pieces_of(tokenizer: Any, prompt: str, response: str) -> list[tuple[str, str | None]]:
    """The rendered text in pieces, each with its kind.

    Valid for plain ChatML, with or without a system text that the template adds, and for no template at all.

    Raises:
        AssertionError: if the template renders something else.
    """
    if tokenizer.chat_template is None:
        return [(prompt, "prompt"), ("\n", None), (response, "response"), (tokenizer.eos_token, None)]
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    body: list[tuple[str, str | None]] = [
        ("<|im_start|>user\n", None),
        (prompt, "prompt"),
        ("<|im_end|>\n<|im_start|>assistant\n", None),
        (response, "response"),
        ("<|im_end|>\n", None),
    ]
    text = "".join(piece for piece, _ in body)
    assert rendered.endswith(text), "the reference knows only ChatML"
    return [(rendered[: len(rendered) - len(text)], None), *body]


def tokenize(tokenizer: Any, prompt: str, response: str, max_length: int) -> Tokens:
    """Render, encode and cut a record, and find out what each token holds from the bytes it stands for.

    A token with any byte of a content character is content; special tokens never are.
    """
    pieces = pieces_of(tokenizer, prompt, response)
    text = "".join(piece for piece, _ in pieces)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    kind_of_byte: list[str | None] = []
    for piece, kind in pieces:
        kind_of_byte += [kind] * len(piece.encode())
    symbols, specials = byte_of_symbol(), set(tokenizer.all_special_ids)
    kinds: list[str | None] = []
    place = 0
    spelled = b""
    for token_id in ids:
        token = tokenizer.convert_ids_to_tokens(token_id)
        content = token.encode() if token_id in specials else bytes(symbols[symbol] for symbol in token)
        held = [kind for kind in kind_of_byte[place : place + len(content)] if kind is not None]
        kinds.append(held[0] if held and token_id not in specials else None)
        place += len(content)
        spelled += content
    assert spelled == text.encode(), "the tokens do not spell the text"
    return Tokens(ids[:max_length], kinds[:max_length], len(ids) > max_length)


def scoped_places(tokens: Tokens, scope: str) -> list[int]:
    """Places of S: the content tokens that the scope lets through."""
    return [i for i, kind in enumerate(tokens.kinds) if kind is not None and scope in ("all", kind)]


# --------------------------------------------------------------------------------------------- saliency


def window_of_layer(config: Any, layer: int) -> int | None:
    """How many keys, itself among them, a query of this layer may see at most; None = all earlier ones."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return window if layer_types[layer] == "sliding_attention" else None
    return window


def visible_keys(query: int, window: int | None) -> range:
    """V_i: the keys that a query may see."""
    first = 0 if window is None else max(0, query - window + 1)
    return range(first, query + 1)


def row_signal(attention: Sequence[Array], windows: Sequence[int | None]) -> Array:
    """Q `[seq]`: one minus the entropy of a query's attention over log|V|, averaged over layers and heads.

    Args:
        attention: A of the layers used, `[heads, seq, seq]` each.
        windows: Their windows.
    """
    length = attention[0].shape[-1]
    signal = np.zeros(length)
    terms = sum(weights.shape[0] for weights in attention)
    for weights, window in zip(attention, windows, strict=True):
        for head in weights:
            for query in range(length):
                keys = visible_keys(query, window)
                if len(keys) == 1:
                    continue
                entropy = -sum(a * math.log(a) for a in (float(head[query, key]) for key in keys) if a > 0)
                signal[query] += 1 - entropy / math.log(len(keys))
    return signal / terms


def column_signal(attention: Sequence[Array], windows: Sequence[int | None]) -> Array:
    """K `[seq]`: mean attention that a key receives from the queries that may see it; arguments as above."""
    length = attention[0].shape[-1]
    signal = np.zeros(length)
    terms = sum(weights.shape[0] for weights in attention)
    for weights, window in zip(attention, windows, strict=True):
        for head in weights:
            received: list[list[float]] = [[] for _ in range(length)]
            for query in range(length):
                for key in visible_keys(query, window):
                    received[key].append(float(head[query, key]))
            signal += [sum(values) / len(values) for values in received]
    return signal / terms


def scale(values: Array, normalize: str) -> Array:
    """Min-max scale to [0, 1], a constant signal to 1; ``none`` leaves the values alone."""
    if normalize == "none":
        return values
    low, high = values.min(), values.max()
    return np.ones_like(values) if high == low else (values - low) / (high - low)


def saliency(
    attention: Sequence[Array], windows: Sequence[int | None], places: Sequence[int], settings: Settings
) -> Saliency:
    """Signals scaled over the scoped places, and alpha, of one target. At least one place is needed."""
    row, column, alpha = (np.full(attention[0].shape[-1], np.nan) for _ in range(3))
    index = list(places)
    row[index] = scale(row_signal(attention, windows)[index], settings.normalize)
    column[index] = scale(column_signal(attention, windows)[index], settings.normalize)
    for i in index:
        alpha[i] = max(ALPHA_FLOOR, settings.row_weight * row[i] + settings.column_weight * column[i])
    return Saliency(row, column, alpha)


# -------------------------------------------------------------------------------- fingerprints and match


def states_of(hidden: Array, token_class: str) -> Array:
    """The state that stands for each token, `[seq, hidden]`: its own, or the one that predicts it."""
    if token_class == "own":
        return hidden
    return np.stack([hidden[max(0, i - 1)] for i in range(len(hidden))])


def unit(vector: Array) -> Array:
    """The vector over its Euclidean norm."""
    return vector / math.sqrt(float(vector @ vector))


def build_bank(targets: Sequence[tuple[Tokens, Array, Array]]) -> Bank:
    """Fingerprints from targets given as (tokens, hidden states `[seq, hidden]`, alpha `[seq]`)."""
    bank = Bank()
    sums: dict[int, Array] = {}
    seen_in: dict[int, set[int]] = {}
    for number, (tokens, hidden, alpha) in enumerate(targets):
        for i, token_id in enumerate(tokens.ids):
            if math.isnan(alpha[i]):
                continue
            sums[token_id] = sums.get(token_id, np.zeros(hidden.shape[1])) + alpha[i] * unit(hidden[i])
            bank.mass[token_id] = bank.mass.get(token_id, 0.0) + float(alpha[i])
            bank.count[token_id] = bank.count.get(token_id, 0) + 1
            seen_in.setdefault(token_id, set()).add(number)
    for token_id, total in sums.items():
        bank.vectors[token_id] = unit(total)
        bank.idf[token_id] = math.log((1 + len(targets)) / (1 + len(seen_in[token_id]))) + 1
    return bank


def nearest_class(token_id: int, state: Array, bank: Bank, embeddings: Array, nearest: str) -> int:
    """t*: the fingerprint class closest by unit input embedding `[vocab, width]`, or by unit hidden state.

    Ties go to the lowest id.
    """
    best, best_value = -1, -math.inf
    for candidate in sorted(bank.vectors):
        if nearest == "embedding":
            value = float(embeddings[token_id] @ embeddings[candidate])
        else:
            value = float(state @ bank.vectors[candidate])
        if value > best_value:
            best, best_value = candidate, value
    return best


def match(tokens: Tokens, hidden: Array, bank: Bank, embeddings: Array, settings: Settings) -> Match:
    """Similarity of each scoped token of a record with hidden states `[seq, hidden]`.

    Args:
        tokens: The record.
        hidden: Its last hidden states.
        bank: The fingerprints.
        embeddings: Unit rows of the input embedding, `[vocab, width]`.
        settings: Scope and fallback.
    """
    similarity = np.full(len(tokens.ids), np.nan)
    direct = np.zeros(len(tokens.ids), dtype=bool)
    for j in scoped_places(tokens, settings.scope):
        token_id, state = tokens.ids[j], unit(hidden[j])
        if token_id in bank.vectors:
            direct[j] = True
            similarity[j] = state @ bank.vectors[token_id]
            continue
        stand_in = nearest_class(token_id, state, bank, embeddings, settings.nearest)
        penalty = {"scale": settings.penalty, "discount": 1 - settings.penalty, "zero": 0.0}
        similarity[j] = penalty[settings.fallback_mode] * (state @ bank.vectors[stand_in])
    return Match(similarity, direct)


# --------------------------------------------------------------------------------------- pool and select


def pool(matched: Match, settings: Settings) -> Pooled:
    """Pool a record's similarities into its scores."""
    scoped = [i for i, value in enumerate(matched.similarity) if not math.isnan(value)]
    if not scoped:
        return Pooled(None, None, None, None, 0)
    values = [float(matched.similarity[i]) for i in scoped]
    mean, top = sum(values) / len(values), max(values)
    coverage = sum(bool(matched.direct[i]) for i in scoped) / len(scoped)
    both = settings.mean_weight * mean + settings.max_weight * top
    formulas = {
        "mean_max_coverage": both + settings.coverage_weight * coverage,
        "mean_max": both,
        "mean": mean,
        "max": top,
    }
    return Pooled(formulas[settings.pooler], mean, top, coverage, len(scoped))


def ranks(scores: Sequence[float | None]) -> list[int | None]:
    """Rank of each record, 1 = best: descending score, ties by pool order, None for no score."""
    scored = [(-score, row) for row, score in enumerate(scores) if score is not None]
    result: list[int | None] = [None] * len(scores)
    for rank, (_, row) in enumerate(sorted(scored), start=1):
        result[row] = rank
    return result


def budget(fraction: float, pool_size: int) -> int:
    """K = max(1, floor(f·N)) of the fraction as written, free of binary rounding."""
    return max(1, math.floor(Decimal(str(fraction)) * pool_size))


# -------------------------------------------------------------------------------------------- the whole


class Reference:
    """A model folder, read once; records are dicts with ``prompt`` and ``response``."""

    def __init__(self, directory: str | Path) -> None:
        """Load the base model in float64 with eager attention, and its tokenizer."""
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModel.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
        weight = self.model.get_input_embeddings().weight.detach().numpy()
        self.embeddings: Array = np.stack([unit(row) for row in weight])
        self._forwards: dict[tuple[int, ...], tuple[Array, list[Array]]] = {}

    def tokens(self, record: dict[str, str], settings: Settings) -> Tokens:
        """Render and cut a record."""
        return tokenize(self.tokenizer, record["prompt"], record["response"], settings.max_length)

    def forward(self, ids: Sequence[int]) -> tuple[Array, list[Array]]:
        """Last hidden states `[seq, hidden]` and each layer's attention `[heads, seq, seq]`.

        Raises:
            AssertionError: if attention is not a distribution over exactly the visible keys.
        """
        known = self._forwards.get(tuple(ids))
        if known is not None:
            return known
        with torch.no_grad():
            output = self.model(torch.tensor([list(ids)]), output_attentions=True, use_cache=False)
        attention = [layer[0].double().numpy() for layer in output.attentions]
        for layer, weights in enumerate(attention):
            window = window_of_layer(self.model.config, layer)
            visible = np.zeros((len(ids), len(ids)), dtype=bool)
            for query in range(len(ids)):
                visible[query, list(visible_keys(query, window))] = True
            assert np.allclose(weights.sum(-1), 1, atol=1e-5), "rows of attention must sum to 1"
            assert (weights[:, ~visible] == 0).all(), "a query saw a key that it may not see"
            assert (weights[:, visible] > 0).all(), "a visible key got no attention at all"
        result = (output.last_hidden_state[0].double().numpy(), attention)
        self._forwards[tuple(ids)] = result
        return result

    def saliency(self, record: dict[str, str], settings: Settings) -> Saliency:
        """Saliency of a target from the last layers' attention."""
        tokens = self.tokens(record, settings)
        _, attention = self.forward(tokens.ids)
        first = max(0, len(attention) - settings.num_layers)
        windows = [window_of_layer(self.model.config, layer) for layer in range(first, len(attention))]
        return saliency(attention[first:], windows, scoped_places(tokens, settings.scope), settings)

    def bank(self, targets: Sequence[dict[str, str]], settings: Settings) -> Bank:
        """Fingerprint bank of the targets, each of which needs a scoped token."""
        parts = []
        for record in targets:
            tokens = self.tokens(record, settings)
            hidden, _ = self.forward(tokens.ids)
            parts.append((tokens, states_of(hidden, settings.token_class), self.saliency(record, settings).alpha))
        return build_bank(parts)

    def match(self, record: dict[str, str], bank: Bank, settings: Settings) -> Match:
        """Token similarities of a pool record against a bank."""
        tokens = self.tokens(record, settings)
        hidden, _ = self.forward(tokens.ids)
        return match(tokens, states_of(hidden, settings.token_class), bank, self.embeddings, settings)
