"""What kind of records a coreset holds: lengths, sources, repetition."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.errors import UserError
from trim_lightning.records.kinds import count_kinds, kind_field
from trim_lightning.records.record import conversation_of
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.word_file import split_words
from trim_lightning.runs.run import Run
from trim_lightning.selection.filters import NearDuplicates

Embed = Callable[[Sequence[Mapping[str, Any]]], NDArray[np.floating[Any]]]
WORDS = 5000  # of every coreset, so that large and small ones can be compared
NEAR = 0.8  # Jaccard similarity of word triples that makes a near duplicate


@dataclass(frozen=True)
class Diversity:
    """Figures of one coreset; None where they cannot be told.

    Attributes:
        median_words: Of a record, prompt and response.
        response_share: Of all words, those in responses.
        kinds: Different values of the records' kind (the first of the usual fields that they have).
        effective_kinds: exp of the entropy of the kinds: how many equally frequent ones would be as mixed.
        distinct_bigrams: Share of different word pairs among the first `WORDS` words.
        compression: Size of those words over their size compressed by zlib: higher is more repetitive.
        near_duplicates: Share of records that are near duplicates of a better one.
        effective_records: How many records with nothing in common would be as diverse, by their embeddings: the Vendi
            score (arXiv 2210.02410) with the cosine as kernel.
    """

    median_words: float | None
    response_share: float | None
    kinds: int | None
    effective_kinds: float | None
    distinct_bigrams: float | None
    compression: float | None
    near_duplicates: float | None
    effective_records: float | None = None


def diversity(run: Run, embed: Embed | None = None) -> Diversity | None:
    """Figures of a run's coreset, None if its records cannot be read.

    Args:
        run: The run.
        embed: Gives a vector per record; without it ``effective_records`` is None.
    """
    records = run.coreset.open_records()
    if records is None or not len(records):
        return None
    turns = [records.record(row).turns for row in range(len(records))]
    texts = ["\n".join(turn.text for turn in record) for record in turns]
    lengths = [len(split_words(text)) for text in texts]
    answered = sum(len(split_words(turn.text)) for record in turns for turn in record if turn.role == "assistant")
    words = [word for text in texts for word in split_words(text)][:WORDS]
    kinds = kinds_of(records)
    return Diversity(
        median_words=float(np.median(lengths)),
        response_share=answered / sum(lengths) if sum(lengths) else None,
        kinds=len(kinds) or None,
        effective_kinds=effective_number(list(kinds.values())),
        distinct_bigrams=distinct_pairs(words),
        compression=compression(" ".join(words)),
        near_duplicates=near_duplicates(texts),
        effective_records=None if embed is None else vendi_score(embed([conversation_of(record) for record in turns])),
    )


def vendi_score(vectors: NDArray[np.floating[Any]]) -> float | None:
    """exp of the entropy of the eigenvalues of the cosine matrix over its size; zero vectors are left out.

    Args:
        vectors: ``[records, hidden]``.
    """
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    units = vectors[norms > 0].astype(np.float64) / norms[norms > 0, None]
    if not len(units):
        return None
    # the same eigenvalues, but for zeros, on the shorter side
    square = units @ units.T if len(units) <= units.shape[1] else units.T @ units
    shares = np.clip(np.linalg.eigvalsh(square) / len(units), 0, None)
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def kinds_of(records: RecordFile) -> Counter[str]:
    """How often each kind of record occurs; empty if records do not say."""
    field = kind_field(records.object(0))
    return Counter() if field is None else count_kinds(map(records.object, range(len(records))), field)


def effective_number(counts: Sequence[int]) -> float | None:
    """exp of the Shannon entropy of a distribution; None of nothing."""
    total = sum(counts)
    if not total:
        return None
    return math.exp(-sum(count / total * math.log(count / total) for count in counts))


def distinct_pairs(words: Sequence[str]) -> float | None:
    """Different neighbouring pairs over all pairs (distinct-2)."""
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else None


def compression(text: str) -> float | None:
    """Bytes over compressed bytes."""
    data = text.encode()
    return len(data) / len(zlib.compress(data, 9)) if data else None


def near_duplicates(texts: Sequence[str]) -> float | None:
    """Share of texts that are near duplicates of an earlier one; None without the library datasketch."""
    try:
        seen = NearDuplicates(texts.__getitem__, NEAR)
    except UserError:
        return None
    repeated = 0
    for place in range(len(texts)):
        if seen.admits(place):
            seen.take(place)
        else:
            repeated += 1
    return repeated / len(texts)
