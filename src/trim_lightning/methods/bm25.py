"""BM25: records that share rare words with the targets (the usual lexical baseline)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trim_lightning.console.progress import progress_bar
from trim_lightning.methods.base import Selector
from trim_lightning.methods.shared import (
    AGGREGATE,
    AGGREGATES,
    check_aggregates,
    fold_targets,
    group_scores,
    targets_table,
    usable_groups,
)
from trim_lightning.records.word_file import WordFile
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.key import key
from trim_lightning.stages.passes import record_words
from trim_lightning.stages.task import SelectionTask
from trim_lightning.store import StageKey

PASSES = 3  # bm25s reads the corpus this often


@dataclass
class Bm25Selector(Selector):
    """Each target is a query, each pool record a document; a record's score is its best (or mean) query's.

    The formula is Lucene's, computed by the library bm25s. Words are lower-cased runs of letters, digits and
    underscores; there is no stemming and no stop list (our choice). A word that a target has twice counts twice.
    """

    uses_model: ClassVar[bool] = False
    k1: float = key(1.5, "how slowly a repeated word saturates", low=0)
    b: float = key(0.75, "how much a long document is discounted", low=0, high=1)
    aggregate: str = key("max", AGGREGATE, choices=AGGREGATES)

    def score(self, task: SelectionTask) -> ScoreTable:
        """Score the pool against every target."""
        assert task.targets is not None
        check_aggregates(task, self.aggregate)
        targets, targets_entry = record_words(task, task.targets.records, "fingerprint")
        queries = [[targets.vocabulary[word] for word in targets[row]] for row in range(len(targets))]
        queries = [[word for word in query if is_word(word)] for query in queries]
        groups = usable_groups(task, lambda row: bool(queries[row]), "no word")
        pool, pool_entry = record_words(task, task.pool, "score")

        def score(groups: Mapping[str, Sequence[int]], aggregate: str) -> dict[str, NDArray[np.float32]]:
            stage_key = StageKey(
                "similarity",
                1,
                {"method": "bm25", "k1": self.k1, "b": self.b, "aggregate": aggregate, "groups": groups},
                {"pool": pool_entry.key.hex, "targets": targets_entry.key.hex},
            )

            def blocks() -> Iterator[tuple[Any, NDArray[Any]]]:
                against = make_index(pool, self.k1, self.b)
                for place, rows in enumerate(groups.values()):
                    yield place, fold_targets((against(queries[row]) for row in rows), len(rows), aggregate)

            return group_scores(task, stage_key, list(groups), blocks)

        return targets_table(task, groups, self.aggregate, score)


def is_word(text: str) -> bool:
    """False for a run of punctuation."""
    return text[0].isalnum() or text[0] == "_"


class Documents:
    """Word ids of each record without punctuation, one in memory at a time; every pass moves the progress bar."""

    def __init__(self, words: WordFile) -> None:
        self._words = words
        self._counts = np.array([is_word(word) for word in words.vocabulary], dtype=bool)
        self._bar = progress_bar("index", PASSES * len(words), unit="records")

    def __len__(self) -> int:
        return len(self._words)

    def __iter__(self) -> Iterator[list[int]]:
        for row in range(len(self._words)):
            ids = self._words[row]
            yield ids[self._counts[ids]].tolist()
            self._bar.update(1)

    @property
    def empty(self) -> bool:
        """True if no document has a word."""
        return not self._counts.any()

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()


def make_index(pool: WordFile, k1: float, b: float) -> Callable[[list[str]], NDArray[np.float64]]:
    """Index the pool: 8 bytes a document and different word in it, about three times that while it is built.

    Every record is a document, also one without words.

    Returns:
        A function from a query's words to ``[records]`` scores.
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every step
    documents = Documents(pool)
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    if not documents.empty:  # bm25s divides by the mean length
        vocabulary = {word: place for place, word in enumerate(pool.vocabulary)}
        corpus = bm25s.tokenization.Tokenized(documents, vocabulary)
        index.index(corpus, create_empty_token=False, show_progress=False)
    documents.close()

    def against(query: list[str]) -> NDArray[np.float64]:
        if documents.empty:
            return np.zeros(len(pool))
        scores: NDArray[np.float64] = index.get_scores_from_ids(index.get_tokens_ids(query)).astype(np.float64)
        return scores

    return against
