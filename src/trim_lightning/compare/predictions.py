"""What a training run did to each held-out record."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_lightning.records.fields import clean_text
from trim_lightning.records.record_file import MOST_LINE_BYTES
from trim_lightning.runs.manifest import BrokenRun

# metric -> the field of predictions.jsonl that holds it, one value per record
FIELDS = {"nll": "nll", "exact_match": "correct", "option_accuracy": "choice_correct"}


@dataclass(frozen=True, eq=False)
class Predictions:
    """Outcomes by held-out record, in one order for every run: by id.

    Attributes:
        ids: ``(id, how many records before it have the same id)`` of each record.
        num_tokens: ``[records]`` response tokens.
        values: Metric to ``[records]`` float64: summed nats, or 1 for right and 0 for wrong; NaN where the metric does
            not apply. A metric that applies to no record is left out.
    """

    ids: tuple[tuple[str, int], ...]
    num_tokens: NDArray[np.float64]
    values: Mapping[str, NDArray[np.float64]]

    def weights(self, metric: str) -> NDArray[np.float64]:
        """``[records]``: response tokens for the loss, which is per token; else one per record; 0 without a value."""
        applies = ~np.isnan(self.values[metric])
        return np.where(applies, self.num_tokens if metric == "nll" else 1.0, 0.0)


def read_predictions(path: Path) -> Predictions:
    """Read ``predictions.jsonl``.

    Raises:
        BrokenRun: if it is missing, or a line is not what a run writes.
    """
    rows = sorted(parsed(path), key=lambda row: row[0])
    columns = np.array([numbers for _, numbers in rows], dtype=np.float64).reshape(len(rows), 1 + len(FIELDS))
    values = {metric: columns[:, place + 1] for place, metric in enumerate(FIELDS)}
    return Predictions(
        tuple(key for key, _ in rows),
        columns[:, 0],
        {metric: column for metric, column in values.items() if not np.isnan(column).all()},
    )


def parsed(path: Path) -> Iterator[tuple[tuple[str, int], tuple[float, ...]]]:
    """Yield each line's key and its numbers: tokens, then the metrics."""
    seen: Counter[str] = Counter()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES), ""), start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    name = clean_text(str(record["id"]))
                    numbers = tuple(as_number(record.get(key)) for key in ("num_tokens", *FIELDS.values()))
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                    raise BrokenRun(f"{path.name} line {number} is not a prediction") from None
                yield (name, seen[name]), numbers
                seen[name] += 1
    except FileNotFoundError:
        raise BrokenRun(f"{path.name} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenRun(f"{path.name} cannot be read ({type(error).__name__})") from error


def as_number(value: Any) -> float:
    """A number, 1 or 0 for true or false, NaN for what a record does not have."""
    return float("nan") if value is None else float(value)
