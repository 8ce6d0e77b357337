"""Targets and candidates token by token, from what a TRIM run left."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trim_lightning.report.facts import MatchView, Occurrence, TargetView, TokenClass
from trim_lightning.report.token_texts import TokenTexts
from trim_lightning.stages.task import MatchedTokens

AROUND = 8  # tokens shown on each side of the heaviest target token


@dataclass(frozen=True)
class Bank:
    """One group's fingerprints without their vectors: arrays ``[classes]``."""

    token_ids: NDArray[np.int64]
    mass: NDArray[np.float32]
    count: NDArray[np.int64]
    idf: NDArray[np.float32]


def read_banks(path: Path) -> tuple[dict[str, Bank], dict[str, list[int]]]:
    """Group name to bank, and group name to the places of its targets; numpy alone reads the file."""
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        settings = json.loads(file.metadata()["settings"])
        banks = {
            group: Bank(*(file.get_tensor(named(group, part)) for part in ("token_ids", "mass", "count", "idf")))
            for group in settings["num_targets"]
        }
    return banks, {group: list(rows) for group, rows in settings.get("groups", {}).items()}


def named(group: str, name: Any) -> str:
    """``name``, with the group before it if there are groups."""
    return f"{group}/{name}" if group else str(name)


def heaviest(banks: Mapping[str, Bank], texts: TokenTexts, most: int) -> list[TokenClass]:
    """The classes with the most saliency in each bank, heaviest first."""
    found = []
    for group, bank in banks.items():
        for place in np.argsort(-bank.mass, kind="stable")[:most]:
            token_id = int(bank.token_ids[place])
            mass, idf = round(float(bank.mass[place]), 4), round(float(bank.idf[place]), 4)
            found.append(TokenClass(token_id, texts.name(token_id), mass, int(bank.count[place]), idf, group))
    return found


class TargetTokenFile:
    """``target_tokens.parquet`` of a run.

    Args:
        path: The file.
        groups: Group name to the places of its targets; ``{"": all}`` without groups.
        texts: Writes tokens as text.
    """

    def __init__(self, path: Path, groups: Mapping[str, Iterable[int]], texts: TokenTexts) -> None:
        self._table = pq.read_table(path)
        self._groups = {group: np.asarray(list(places), dtype=np.int64) for group, places in groups.items()}
        self._texts = texts
        self._decoded: dict[int, list[str]] = {}
        self._best: dict[str, dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self._table)

    def view(self, place: int, most: int) -> TargetView:
        """One target with at most so many tokens."""
        row = {name: self._table[name][place].as_py() for name in self._table.column_names}
        texts = self._texts_of(place)
        return TargetView(
            id=row["id"],
            texts=texts[:most],
            row=rounded(row["row_saliency"][:most]),
            column=rounded(row["column_saliency"][:most]),
            saliency=rounded(row["saliency"][:most]),
            clipped=max(0, len(texts) - most),
        )

    def occurrence(self, token_id: int, group: str) -> Occurrence | None:
        """Where a class weighs most among the targets of a group."""
        _, _, target, place = self._flat
        best = self._heaviest(group).get(token_id)
        if best is None:
            return None
        where, position = int(target[best]), int(place[best])
        texts = self._texts_of(where)
        start = position  # a class that is part of a character is shown with the whole character
        while start > 0 and texts[start] == "":
            start -= 1
        return Occurrence(
            target=str(self._table["id"][where].as_py()),
            place=position,
            saliency=round(float(self._flat[1][best]), 4),
            before="".join(texts[max(0, start - AROUND) : start]),
            text=texts[start],
            after="".join(texts[start + 1 : start + 1 + AROUND]),
        )

    def _heaviest(self, group: str) -> dict[int, int]:
        """Where each class of a group's targets weighs most, the first of equals: one sort for all classes."""
        if group not in self._best:
            ids, saliency, target, _ = self._flat
            scoped = np.flatnonzero(
                np.isfinite(saliency) & np.isin(target, self._groups.get(group, np.arange(len(self))))
            )
            order = scoped[np.lexsort((scoped, -saliency[scoped], ids[scoped]))]
            classes, first = np.unique(ids[order], return_index=True)
            self._best[group] = dict(zip(classes.tolist(), order[first].tolist(), strict=True))
        return self._best[group]

    def _texts_of(self, place: int) -> list[str]:
        if place not in self._decoded:
            self._decoded[place] = self._texts.pieces(self._table["token_ids"][place].as_py())
        return self._decoded[place]

    @cached_property
    def _flat(self) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """``[tokens]`` of all targets: class, saliency (NaN outside the scope), target, place in it."""
        ids = list_column(self._table, "token_ids")
        lengths = np.diff(ids.offsets.to_numpy())
        target = np.repeat(np.arange(len(self)), lengths)
        place = np.arange(len(target)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        saliency = list_column(self._table, "saliency").flatten().to_numpy(zero_copy_only=False)
        return ids.flatten().to_numpy(), saliency, target, place


def list_column(table: pa.Table, name: str) -> pa.ListArray:
    """A list column in one piece whose offsets start at 0."""
    column = table[name].combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def match_view(tokens: MatchedTokens, texts: TokenTexts, most: int) -> MatchView:
    """A candidate with at most so many tokens."""
    scope = tokens.scope[:most].tolist()
    similarity = tokens.similarity.tolist()
    direct = tokens.match == tokens.token_ids
    return MatchView(
        texts=texts.pieces(tokens.token_ids.tolist())[:most],
        similarity=rounded(value if inside else None for value, inside in zip(similarity, scope, strict=False)),
        match=[value if inside else None for value, inside in zip(tokens.match.tolist(), scope, strict=False)],
        direct=[value if inside else None for value, inside in zip(direct.tolist(), scope, strict=False)],
        group=tokens.group,
        clipped=max(0, len(tokens.token_ids) - most),
        alignment=[] if tokens.alignment is None else rounded(tokens.alignment[:most].tolist(), significant=True),
    )


def rounded(values: Iterable[float | None], significant: bool = False) -> list[float | None]:
    """Four digits are all that a tint can show, and of what has no bounds that many significant ones.

    What is not a finite number is not shown.
    """
    return [
        None if value is None or not math.isfinite(value) else float(f"{value:.4g}") if significant else round(value, 4)
        for value in values
    ]
