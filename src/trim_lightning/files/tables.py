"""Parquet files, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trim_lightning.files.atomic import replacing


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """A streaming Parquet writer onto a temporary file that takes the place of ``path`` at the end."""
    with replacing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        yield writer


def write_table(table: pa.Table, path: Path) -> None:
    """Write a small Parquet file."""
    with table_writer(path, table.schema) as writer:
        writer.write_table(table)
