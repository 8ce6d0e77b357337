"""Records in the layouts of other trainers.

The layouts are those that the trainers document: ``messages`` (TRL, Axolotl, Unsloth and most others), Alpaca and
ShareGPT with ``dataset_info.json`` (LLaMA-Factory). Fields that name a record's licence go with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from trim_lightning.errors import UserError
from trim_lightning.files.atomic import copy_atomically, replacing, write_text
from trim_lightning.files.tables import table_writer
from trim_lightning.records.fields import clean_text
from trim_lightning.records.licences import LICENCES, licences_of
from trim_lightning.records.record import TOOLS, Turn, conversation_of, messages_of
from trim_lightning.records.record_file import RecordFile
from trim_lightning.runs.names import CORESET

DATASET = "trim_coreset"  # the data set's name in dataset_info.json
BATCH = 1024  # records converted at once
# JSON readers infer a column's type from the first megabytes, so a type must show before that
EARLY = 1 << 20
OPTIONAL = ("system", "history")  # Alpaca fields that are written if a record uses them
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}  # as ShareGPT calls them
MORE = ("reasoning_content", "tool_calls", "train", "name", "tool_call_id")  # fields of messages that use them


def write_verbatim(records: RecordFile, coreset: Path, directory: Path) -> tuple[list[Path], list[int]]:
    """Copy the coreset byte for byte."""
    path = directory / CORESET
    copy_atomically(coreset, path)
    return [path], list(range(len(records)))


def write_messages(records: RecordFile, coreset: Path, directory: Path) -> tuple[list[Path], list[int]]:
    """Write ``messages.jsonl``: one conversation per line."""
    path = directory / "messages.jsonl"
    order = list(range(len(records)))
    licences = shared_licences(records)
    write_lines(({**conversation_of(records.record(row).turns), **licences(row)} for row in order), path)
    return [path], order


def shared_licences(records: RecordFile) -> Callable[[int], dict[str, str]]:
    """Gives the licence fields of a row: those that any record has, empty where this one lacks them.

    A column that begins without a type would fail the readers of JSON lines.
    """
    found = [licences_of(records.object(row)) for row in range(len(records))]
    used = [name for name in LICENCES if any(name in fields for fields in found)]
    return lambda row: {name: found[row].get(name, "") for name in used}


def write_parquet(records: RecordFile, coreset: Path, directory: Path) -> tuple[list[Path], list[int]]:
    """Write ``messages.parquet``: the same conversations as a typed column."""
    path = directory / "messages.parquet"
    order = list(range(len(records)))
    used = {key for row in order for message in messages_of(records.record(row).turns) for key in message}
    tools = any(turn.role == TOOLS for row in order for turn in records.record(row).turns)
    licences = shared_licences(records)
    schema = messages_schema(used, tools, licences(0) if order else ())
    with table_writer(path, schema) as writer:
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = [{**as_columns(conversation_of(records.record(row).turns)), **licences(row)} for row in rows]
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    return [path], order


def messages_schema(used: set[str], tools: bool, licences: Iterable[str]) -> pa.Schema:
    """The columns of conversations whose messages have some fields; calls and tools, of any shape, are JSON text."""
    fields = [("role", pa.string()), ("content", pa.string())]
    fields += [(name, pa.bool_() if name == "train" else pa.string()) for name in MORE if name in used]
    columns = [("messages", pa.list_(pa.struct(fields)))]
    return pa.schema(columns + [("tools", pa.string())] * tools + [(name, pa.string()) for name in licences])


def as_columns(conversation: dict[str, Any]) -> dict[str, Any]:
    """A conversation as `messages_schema` has it."""
    messages = [
        {**message, **({"tool_calls": as_json(message["tool_calls"])} if "tool_calls" in message else {})}
        for message in conversation["messages"]
    ]
    return {"messages": messages, **({"tools": as_json(conversation["tools"])} if "tools" in conversation else {})}


def as_json(value: Any) -> str:
    """A value as JSON text."""
    return json.dumps(value, ensure_ascii=False)


def write_alpaca(records: RecordFile, coreset: Path, directory: Path) -> tuple[list[Path], list[int]]:
    """Write ``alpaca.jsonl`` and the ``dataset_info.json`` that tells LLaMA-Factory of it.

    Raises:
        UserError: if a conversation has a shape that Alpaca cannot hold.
    """
    extra, order = survey(alpaca_of(records, row) for row in range(len(records)))
    path = directory / "alpaca.jsonl"
    kept = ("instruction", "input", "output", *extra)
    licences = shared_licences(records)
    converted = ((alpaca_of(records, row), licences(row)) for row in order)
    write_lines(({**{name: fields[name] for name in kept}, **more} for fields, more in converted), path)
    columns = {"prompt": "instruction", "query": "input", "response": "output", **{name: name for name in extra}}
    entry = {"file_name": path.name, "formatting": "alpaca", "columns": columns}
    return [path, write_info(entry, directory)], order


def write_info(entry: dict[str, Any], directory: Path) -> Path:
    """Write the file by which LLaMA-Factory knows a data set."""
    info = directory / "dataset_info.json"
    write_text(json.dumps({DATASET: entry}, indent=2) + "\n", info)
    return info


def alpaca_of(records: RecordFile, row: int) -> dict[str, Any]:
    """A record's Alpaca fields: the last exchange, the exchanges before it as history, the system text.

    An Alpaca record keeps its own division of the prompt into instruction and input.

    Raises:
        UserError: if the turns are not an optional system turn and then user and assistant in exchange.
    """
    turns = plain_turns(records, row, "Alpaca")
    system = turns.pop(0).content if turns and turns[0].role == "system" else ""
    users, assistants = turns[::2], turns[1::2]
    fits = turns and len(users) == len(assistants)
    if not fits or {turn.role for turn in users} != {"user"} or {turn.role for turn in assistants} != {"assistant"}:
        roles = ", ".join(turn.role for turn in records.record(row).turns) or "none"
        raise UserError(
            f"{records.place(row)}: Alpaca holds an optional system turn, then user and assistant turns in exchange, "
            f"not the turns {roles}; use --format messages"
        )
    *history, (instruction, output) = [
        [user.content, assistant.content] for user, assistant in zip(users, assistants, strict=True)
    ]
    extra = ""
    layout = records.layout.layout_of(records.object(row))
    if layout.extra is not None and (given := records.object(row).get(layout.extra)):
        instruction, extra = instruction.removesuffix(f"\n{clean_text(given)}"), clean_text(given)
    return {"instruction": instruction, "input": extra, "output": output, "system": system, "history": history}


def plain_turns(records: RecordFile, row: int, layout: str) -> list[Turn]:
    """The turns of a record for a layout that holds nothing but who speaks and what was said.

    Raises:
        UserError: if the record has more.
    """
    everything = records.record(row).turns
    turns = [turn for turn in everything if turn.role != TOOLS]
    lost = ["tools"] * (len(turns) < len(everything)) + ["thoughts, calls or masks"] * any(
        not turn.plain for turn in turns
    )
    if lost:
        raise UserError(f"{records.place(row)}: {layout} cannot hold {' and '.join(lost)}; use --format messages")
    return turns


def write_sharegpt(records: RecordFile, coreset: Path, directory: Path) -> tuple[list[Path], list[int]]:
    """Write ``sharegpt.jsonl`` and the ``dataset_info.json`` that tells LLaMA-Factory of it.

    Raises:
        UserError: if a conversation has more than speakers and texts.
    """
    path, order, licences = directory / "sharegpt.jsonl", list(range(len(records))), shared_licences(records)

    def line(row: int) -> dict[str, Any]:
        turns = plain_turns(records, row, "ShareGPT")
        return {
            "conversations": [{"from": SPEAKERS[turn.role], "value": turn.content} for turn in turns],
            **licences(row),
        }

    write_lines(map(line, order), path)
    tags = {"role_tag": "from", "content_tag": "value"}
    tags |= {"user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation", "system_tag": "system"}
    columns = {"messages": "conversations"}
    entry = {"file_name": path.name, "formatting": "sharegpt", "columns": columns, "tags": tags}
    return [path, write_info(entry, directory)], order


def survey(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[int]]:
    """Which optional fields the rows use, and the order to write them in.

    The order is theirs, unless the first history would come too late: readers of JSON lines take a column's type from
    the first megabytes, a history that is empty there has no type, and the first that is not fails them. Then, and only
    then, that row comes first (our choice).
    """
    used: set[str] = set()
    size, first, number = 0, None, 0
    for number, row in enumerate(rows, start=1):
        used.update(name for name in OPTIONAL if row[name])
        if row["history"] and first is None:
            first = number - 1 if size > EARLY else 0
        size += sum(len(row[name]) for name in ("instruction", "input", "output", "system"))
    order = list(range(number))
    if first:
        order.insert(0, order.pop(first))
    return [name for name in OPTIONAL if name in used], order


def write_lines(rows: Iterator[dict[str, Any]], path: Path) -> None:
    """Write JSON lines in UTF-8."""
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def write_score_lines(scores: pa.Table, path: Path) -> None:
    """Write the side file as JSON lines."""
    write_lines((row for batch in scores.to_batches(max_chunksize=BATCH) for row in batch.to_pylist()), path)


Writer = Callable[[RecordFile, Path, Path], tuple[list[Path], list[int]]]
# ``writer(records, coreset file, directory)`` returns the files and, for each line, the row of the coreset in it.
FORMATS: dict[str, Writer] = {
    "jsonl": write_verbatim,
    "messages": write_messages,
    "alpaca": write_alpaca,
    "sharegpt": write_sharegpt,
    "parquet": write_parquet,
}
