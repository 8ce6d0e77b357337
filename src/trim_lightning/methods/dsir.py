"""DSIR: importance weights from hashed n-grams (arXiv 2302.03169)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trim_lightning.console.progress import progress_bar
from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import group_scores, score_table, usable_groups
from trim_lightning.records.word_file import WordFile
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.passes import record_words
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import StageKey

BLOCK = 4096  # records whose n-grams are held at once
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass
class DsirSelector(Selector):
    """A record's score is its log importance weight under two bag-of-n-grams models, targets against pool.

    The n-grams (words and pairs of neighbours) are hashed into buckets, as in the paper. A few targets leave
    most buckets empty, so the target model is shrunk towards the pool's (our choice, see `log_ratios`).
    """

    uses_model: ClassVar[bool] = False
    buckets: int = key(10_000, "hash buckets of the n-grams", low=1)
    smoothing: float = key(3000.0, "n-grams that the pool's distribution weighs against the targets'", above=0)
    per_ngram: bool = key(False, "divide by the number of n-grams, which takes away the effect of length")
    min_words: int = key(0, "fewest words and punctuation runs of a scored record; 100 is the original's", low=0)
    noise: bool = key(False, "add Gumbel noise by seed: a draw by importance instead of the top")

    def score(self, task: SelectionTask) -> ScoreTable:
        """Weigh the pool for every target group."""
        assert task.targets is not None
        targets, targets_entry = record_words(task, task.targets.records, "fingerprint")
        groups = usable_groups(task, lambda row: len(targets[row]) > 0, "no word")
        pool, pool_entry = record_words(task, task.pool, "score")
        stage_key = StageKey(
            "similarity",
            1,
            {
                "method": "dsir",
                "buckets": self.buckets,
                "smoothing": self.smoothing,
                "per_ngram": self.per_ngram,
                "groups": groups,
            },
            {"pool": pool_entry.key.hex, "targets": targets_entry.key.hex},
        )

        def blocks() -> Iterator[tuple[Any, Floats]]:
            with progress_bar("weigh", 2 * len(pool), unit="records") as bar:
                ngrams = HashedNgrams(pool, self.buckets)
                seen = np.zeros(self.buckets, dtype=np.int64)
                for rows, _, found in ngrams.blocks():
                    seen += np.bincount(found, minlength=self.buckets)
                    bar.update(len(rows))
                wanted = [HashedNgrams(targets, self.buckets).count(rows) for rows in groups.values()]
                ratios = [log_ratios(counts, seen, self.smoothing) for counts in wanted]
                for rows, owner, found in ngrams.blocks():
                    sizes = np.maximum(np.bincount(owner, minlength=len(rows)), 1) if self.per_ngram else 1
                    weights = [np.bincount(owner, ratio[found], minlength=len(rows)) / sizes for ratio in ratios]
                    yield np.s_[:, rows.start : rows.stop], np.stack(weights)
                    bar.update(len(rows))

        scores = group_scores(task, stage_key, list(groups), blocks)
        long_enough = np.diff(pool.offsets) >= self.min_words
        scores = {group: np.where(long_enough, values, np.nan) for group, values in scores.items()}
        if self.noise:
            draws = np.random.default_rng([task.settings.seed, 0xD5]).gumbel(size=len(task.pool))
            return score_table(task, {group: values + draws for group, values in scores.items()})
        return score_table(task, scores)


def log_ratios(wanted: Counts, seen: Counts, smoothing: float) -> Floats:
    """Log of the targets' probability of each bucket over the pool's.

    With T target n-grams, p(b) = seen / Σ seen and q(b) = (wanted + smoothing · p(b)) / (T + smoothing): the
    target model starts from the pool's and moves as far as its evidence goes (a Dirichlet prior). A bucket
    that no target has costs log(smoothing / (T + smoothing)), the same for all; with more and more targets
    this becomes the paper's ratio.

    Args:
        wanted: ``[buckets]`` counts of the targets' n-grams.
        seen: ``[buckets]`` counts of the pool's.
        smoothing: Weight of the pool's distribution, in n-grams.

    Returns:
        ``[buckets]``; 0 where the pool has nothing, which is never asked for.
    """
    here = seen > 0
    share = seen[here] / seen.sum()
    ratios = np.zeros(len(seen))
    ratios[here] = np.log((wanted[here] / share + smoothing) / (wanted.sum() + smoothing))
    return ratios


class HashedNgrams:
    """Buckets of the words and neighbouring pairs of words of records.

    The hash depends on the text alone: BLAKE2b of a word's UTF-8, and for a pair the mixed hash of both
    (splitmix64's finaliser), modulo the number of buckets.

    Args:
        words: The records' words.
        buckets: Number of buckets.
    """

    def __init__(self, words: WordFile, buckets: int) -> None:
        self._words = words
        self._buckets = np.uint64(buckets)
        self._hashes = np.array([hash_word(word) for word in words.vocabulary], dtype=np.uint64)

    def of(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The record (counted from ``start``) and the bucket of every n-gram in rows ``[start, stop)``."""
        offsets = self._words.offsets[start : stop + 1]
        hashes = self._hashes[self._words.ids[offsets[0] : offsets[-1]]]
        owner = np.repeat(np.arange(stop - start), np.diff(offsets))
        together = owner[1:] == owner[:-1]
        pairs = mix(mix(hashes[:-1]) + hashes[1:])[together]
        buckets = np.concatenate([hashes, pairs]) % self._buckets
        return np.concatenate([owner, owner[1:][together]]), buckets.astype(np.int64)

    def blocks(self) -> Iterator[tuple[range, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield rows and what `of` says of them, a few thousand records at a time."""
        for start in range(0, len(self._words), BLOCK):
            rows = range(start, min(len(self._words), start + BLOCK))
            yield rows, *self.of(rows.start, rows.stop)

    def count(self, rows: list[int]) -> Counts:
        """``[buckets]`` n-grams of some records."""
        total = np.zeros(int(self._buckets), dtype=np.int64)
        for row in rows:
            total += np.bincount(self.of(row, row + 1)[1], minlength=len(total))
        return total


def hash_word(word: str) -> int:
    """64-bit hash of a word, the same in every process."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all 64 (the last step of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
