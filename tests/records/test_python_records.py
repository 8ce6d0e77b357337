"""What a program may hand over as records."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from trim_lightning.errors import UserError
from trim_lightning.records.layouts import LayoutReader
from trim_lightning.records.python_records import as_records
from trim_lightning.records.shapes import FieldKeys

ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "n": 1, "system": None},
    {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "n": 2, "system": "s"},
]
FRAME = pd.DataFrame(
    {"messages": [np.array(row["messages"]) for row in ROWS], "n": [1, np.nan], "system": [np.nan, "s"]}
)


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        (row for row in ROWS),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        pa.Table.from_pylist(ROWS),
        FRAME,
        np.array(ROWS),
    ],
)
def test_records_are_read_out_of_whatever_holds_them(given: Any) -> None:
    reader = LayoutReader(FieldKeys(), "records")
    said = [[turn.content for turn in reader.turns(record)] for record in as_records(given)]
    assert said == [["a", "b"], ["s", "c", "d"]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), "the splits train"),
        (ROWS[0], "one mapping"),
        ("text", "this is text"),
        (["text"], "record 0: this is str"),
        (3, "this is int"),
    ],
)
def test_what_holds_none_is_one_clear_line(given: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        list(as_records(given))
