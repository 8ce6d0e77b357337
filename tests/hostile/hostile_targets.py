"""What the fuzzer calls: one function of bytes for every reader, and examples to start from.

A function returns True for a valid result and False for the reader's one clear error; it raises for everything else.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import shutil
import struct
import sys
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from composing import compose_select, compose_train
from tiny_models import build_tiny_tokenizer
from trim_lightning.cli.export import export
from trim_lightning.compare.files import difference_rows, run_rows, write_rows
from trim_lightning.compare.predictions import read_predictions
from trim_lightning.compare.report import compare
from trim_lightning.compare.tables import report_text
from trim_lightning.console.visible import visible
from trim_lightning.errors import UserError
from trim_lightning.methods.base import load_selector, method_names
from trim_lightning.models.adapter import check_adapter
from trim_lightning.models.source import config_layers, read_config
from trim_lightning.records.fields import LayoutError, clean_text
from trim_lightning.records.filters import RecordFilter
from trim_lightning.records.layouts import choose_layout
from trim_lightning.records.record import Turn
from trim_lightning.records.sources import open_records
from trim_lightning.report.comparison_page import write_comparison
from trim_lightning.report.page import data_block
from trim_lightning.runs.find import Found
from trim_lightning.runs.manifest import BrokenRun
from trim_lightning.runs.reopened import open_run
from trim_lightning.runs.run import read_runs
from trim_lightning.settings.guard import guard_hydra
from trim_lightning.settings.schema import ModelSettings, SourceSettings
from trim_lightning.store import Store
from trim_lightning.store.inventory import damage, items, receipt_of
from trim_lightning.store.keys import StageKey
from trim_lightning.store.receipt import RECEIPT, StoreError, seal_of
from trim_lightning.tokens import bounds
from trim_lightning.tokens.rendering import ChatRenderer, Encoded, RenderError

sys.path.append(str(Path(__file__).resolve().parents[1] / "tokens"))
from templates import STYLES

Task = Callable[[bytes], bool]

# what stands for a byte in the structured inputs: pieces of JSON, names that readers know, and values that hurt
PIECES = [
    "{", "}", "[", "]", ",", ":", '"', "\n", " ", "null", "true", "false", "0", "-1", "1e400", "NaN", "-Infinity", "1.5",
    '"prompt":', '"response":', '"completion":', '"instruction":', '"input":', '"output":', '"system":', '"history":',
    '"conversations":', '"messages":', '"role":', '"content":', '"from":', '"value":', '"user"', '"assistant"', '"human"',
    '"gpt"', '"tool"', '"type":', '"text":', '"text"', '"tool_calls":', '"id":', '"meta":', '"a"', '""', '"\\ud800"',
    '"\\u0000"', '"\u202e<script>"', '"é\U0001f600"', "[[[[[[[[", "]]]]]]]]", '{"a":{"a":{"a":', "}}}", "\\", "\ufeff", "\r",
    "9" * 30, "1" * 4400, "\u2028", '{"prompt": "a", "response": "b"}\n', '"image"', "</script>", "${oc.env:HOME}", "\x1b[2J",
]  # fmt: skip
WORDS = [piece.encode("utf-8", "surrogatepass")[:60] for piece in PIECES] + [
    b"PAR1", b"\x1f\x8b\x08", b"{%", b"%}", b"{{", b"}}", b"messages", b"for x in range(99999)", b"endfor", b"__class__",
    b"_target_", b"hydra", b"=", b"+", b"~", b"model.path", b"pool.where", b"method.name", b"../", b"\x00", b"F32", b"BF16",
    b"data_offsets", b"shape", b"dtype", b"__metadata__", b"seal", b"files", b"sha256", b"size", b"facts", b"config", b"seed",
]  # fmt: skip
SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 7, 10**18, 10**40, -(10**400), 1.5, -0.0, 1e308, float("inf"), float("nan"), "", "a", "text",
    "trim", "random", "user", "assistant", "system", "../../x", "/etc/passwd", "a\x00b", "\ud800", "\x1b[31m", "</script><b>",
    "\u202eevil\u2028", "${oc.env:HOME}", "${seed}", "x" * 3000, "é\U0001f600", "eval/nll", "true", "1e3", "~", "file",
]  # fmt: skip
NAMES = [
    "prompt", "response", "completion", "instruction", "input", "output", "system", "history", "conversations", "messages",
    "role", "content", "from", "value", "type", "text", "tool_calls", "id", "name", "path", "sha256", "rows", "seconds", "key",
    "tokens", "seed", "method", "model", "pool", "target", "config", "counts", "stages", "a.b", "", "\ud800", "<b>", "_target_",
]  # fmt: skip


class Bytes:
    """Small numbers from bytes, zero when there are no more."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def number(self, below: int) -> int:
        """One of the numbers from 0."""
        if self.place >= len(self.data):
            return 0
        self.place += 1
        value = self.data[self.place - 1]
        if below > 256 and self.place < len(self.data):
            self.place += 1
            value = value << 8 | self.data[self.place - 1]
        return value % below

    @property
    def rest(self) -> bytes:
        """What is left."""
        return self.data[self.place :]

    def value(self, depth: int = 0) -> Any:
        """A JSON value."""
        kind = self.number(12)
        if kind < 6 or depth > 6:
            return SCALARS[self.number(len(SCALARS))]
        if kind < 8:
            return [self.value(depth + 1) for _ in range(self.number(5))]
        return {NAMES[self.number(len(NAMES))]: self.value(depth + 1) for _ in range(self.number(6))}


RECORDS: list[dict[str, Any]] = [
    {"prompt": "a", "response": "b", "id": 3, "meta": "a"},
    {"instruction": "a", "input": "x", "output": "b", "history": [["a", "b"]], "system": "s"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"a": {"a": "x"}, "response": "y", "meta": 1},
]


def structured(data: bytes) -> bytes:
    """Bytes as they are, or pieces of JSON in their place, or a record or two of a known layout with places changed."""
    if data and data[0] % 4 >= 2:
        source = Bytes(data[1:])
        base = RECORDS[source.number(len(RECORDS))]
        lines = [base] * source.number(2) + [edited(base, source) for _ in range(1 + source.number(2))]
        return b"\n".join(text_of(line) for line in lines)
    if not data or data[0] % 4 == 0:
        return data[1:]
    pieces = (PIECES[byte] if byte < len(PIECES) else chr(byte & 127) for byte in data[1:])
    return "".join(pieces).encode("utf-8", "surrogatepass")


def edited(base: Any, source: Bytes) -> Any:
    """A JSON value with one to three places in it replaced, removed or added to."""
    value = json.loads(json.dumps(base))
    for _ in range(1 + source.number(3)):
        spot = value
        for _ in range(1 + source.number(5)):
            names = list(spot) if isinstance(spot, dict) else range(len(spot))
            if not names:
                break
            name = names[source.number(len(names))]
            if not isinstance(spot[name], dict | list) or not spot[name] or source.number(4) == 0:
                action = source.number(6)
                if action == 0 and isinstance(spot, dict):
                    del spot[name]
                elif action == 1 and isinstance(spot, dict):
                    spot[NAMES[source.number(len(NAMES))]] = source.value()
                else:
                    spot[name] = source.value()
                break
            spot = spot[name]
    return value


def text_of(value: Any) -> bytes:
    """JSON as a careless program would write it, NaN and lone surrogates among it."""
    return json.dumps(value, ensure_ascii=True).encode()


def refusal(error: Exception) -> bool:
    """False, after a look at the message: something is said."""
    assert str(error).strip()
    return False


# --- records ------------------------------------------------------------------------------------------------


def spool_in(work: Path) -> Callable[..., Path]:
    folder = work / "spool"

    def spool(kind: str, key: Mapping[str, object], build: Callable[[Path], None]) -> Path:
        json.dumps(key)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        build(folder)
        return folder

    return spool


VARIANTS: list[dict[str, Any]] = [
    {}, {"prompt_field": "a.a", "response_field": "response"}, {"id_field": "id"}, {"where": {"meta": ["a", 1]}},
    {"exclude": {"a.a": [None, True]}}, {"prompt_field": "messages", "response_field": "text"},
]  # fmt: skip


def read(source: SourceSettings, spool: Callable[..., Path]) -> bool:
    try:
        found = open_records(source, what="pool", seed=1, spool=spool)
    except UserError as error:
        return refusal(error)
    for row in range(min(len(found), 40)):
        record = found.record(row)
        record.id.encode()
        for turn in record.turns:
            turn.content.encode()
        assert found.line(row)
        found.place(row)
    json.dumps(found.identity())
    return True


def jsonl(work: Path) -> Task:
    path, spool = work / "pool.jsonl", spool_in(work)

    def task(data: bytes) -> bool:
        path.write_bytes(structured(data[1:]))
        variant = VARIANTS[data[0] % len(VARIANTS)] if data else {}
        return read(SourceSettings(source="jsonl", path=str(path), **variant), spool)

    return task


def packed(work: Path) -> Task:
    path, spool = work / "pool.jsonl.gz", spool_in(work)

    def task(data: bytes) -> bool:
        if data[:1] and data[0] % 3 == 0:
            path.write_bytes(gzip.compress(structured(data[1:]), 1, mtime=0))
        else:
            path.write_bytes(data[1:])
        return read(SourceSettings(source="jsonl", path=str(path)), spool)

    return task


def parquet(work: Path) -> Task:
    path, spool = work / "pool.parquet", spool_in(work)

    def task(data: bytes) -> bool:
        path.write_bytes(data)
        return read(SourceSettings(source="parquet", path=str(path)), spool)

    return task


def layouts(work: Path) -> Task:
    def task(data: bytes) -> bool:
        source = Bytes(data)
        variant = VARIANTS[source.number(len(VARIANTS))]
        record = edited(RECORDS[source.number(len(RECORDS))], source)
        try:
            RecordFilter(variant.get("where", {}), variant.get("exclude", {}), "pool").keep(record)
            fields = variant.get("prompt_field"), variant.get("response_field")
            turns = choose_layout(record, *fields, what="pool", where="pool line 1").turns(record)
        except (UserError, LayoutError) as error:
            return refusal(error)
        for turn in turns:
            clean_text(turn.content).encode()
        return True

    return task


# --- tokens -------------------------------------------------------------------------------------------------


def conversation(data: bytes) -> list[Turn]:
    """Turns: each begins with a byte below 4 that says whose it is."""
    turns, role, text = [], "user", bytearray()
    for byte in data:
        if byte < 4:
            turns.append(Turn(role, text.decode("utf-8", "surrogateescape")))  # type: ignore[arg-type]
            role, text = ("system", "user", "assistant", "tool")[byte], bytearray()
        else:
            text.append(byte)
    return [*turns, Turn(role, text.decode("utf-8", "surrogateescape"))]  # type: ignore[arg-type]


def check_encoded(encoded: Encoded | RenderError, most: int) -> bool:
    if isinstance(encoded, RenderError):
        return refusal(encoded)
    assert encoded.token_ids.shape == encoded.roles.shape
    assert len(encoded.token_ids) <= most
    assert set(encoded.roles.tolist()) <= {0, 1, 2}
    return True


def render(work: Path) -> Task:
    renderers = [ChatRenderer(build_tiny_tokenizer(chat_template=style.template)) for style in STYLES.values()]
    renderers.append(ChatRenderer(build_tiny_tokenizer(chat_template=None)))

    def task(data: bytes) -> bool:
        source = Bytes(data)
        renderer = renderers[source.number(len(renderers))]
        turns = conversation(source.rest)
        (encoded,) = renderer.encode([turns], 300)
        if isinstance(encoded, Encoded):
            made = renderer.render(turns)
            ends = [0, *(end for span in made.spans for end in span[:2]), len(made.text)]
            assert ends == sorted(ends)
        return check_encoded(encoded, 300)

    return task


def template(work: Path) -> Task:
    bounds.MOST_SECONDS = 1.0  # else one template that never ends takes as long as a thousand others
    tokenizer = build_tiny_tokenizer()
    turns = [Turn("system", "be brief"), Turn("user", "a question"), Turn("assistant", "an answer")]

    def task(data: bytes) -> bool:
        text = data.decode("utf-8", "replace")
        try:
            renderer = ChatRenderer(tokenizer, text)
            first, second = renderer.encode([turns, turns[1:]], 300)
        except UserError as error:
            return refusal(error)
        return check_encoded(first, 300) | check_encoded(second, 300)

    return task


# --- config -------------------------------------------------------------------------------------------------


def overrides(work: Path) -> Task:
    guard_hydra()

    def task(data: bytes) -> bool:
        lines = [line for line in data[1:].decode("utf-8", "surrogateescape").split("\n") if line]
        made, place = (compose_train, "train") if data[:1] == b"t" else (compose_select, "select")
        try:
            made([f"paths.output_dir={place}", *lines])
        except UserError as error:
            return refusal(error)
        return True

    return task


def method(work: Path) -> Task:
    names = method_names()
    keys = ["count", "checkpoints", "num_checkpoints", "seed", "dimension", "clusters", "model", "k1", "b", "_target_", *NAMES]  # fmt: skip

    def task(data: bytes) -> bool:
        source = Bytes(data)
        asked = {"name": [*names, *SCALARS][source.number(len(names) + len(SCALARS))]}
        asked.update({keys[source.number(len(keys))]: source.value() for _ in range(source.number(4))})
        try:
            load_selector(asked)
        except UserError as error:
            return refusal(error)
        return True

    return task


# --- run directories ----------------------------------------------------------------------------------------

LINES = b'{"prompt": "a", "response": "b", "type": "x"}\n{"prompt": "c", "response": "d", "type": "<b>"}\n'


def base_manifest() -> dict[str, Any]:
    config = {
        "seed": 0, "max_length": 256, "method": {"name": "trim"}, "model": {"path": "a/b", "dtype": "float32"},
        "selection": {"fraction": None, "count": 2, "tokens": None}, "trainer": {},
        "pool": {"source": "jsonl", "path": "pool.jsonl", "where": {}, "exclude": {}, "limit": None, "sample": None},
        "target": {"path": "t", "num_examples": 4}, "paths": {"store_dir": "s", "output_dir": "o"},
    }  # fmt: skip
    stages = {"score": {"key": "0" * 64, "seconds": 1.5, "tokens": 10, "tokens_per_second": 6.0, "cached": False}}
    inputs = {name: {"sha256": "ab" * 32, "rows": 3, "name": name} for name in ("pool", "target", "model")}
    counts = {"pool": 3, "scored": 3, "selected": 2, "selected_tokens": 9, "unscored": 0}
    return {"config": config, "inputs": inputs, "stages": stages, "counts": counts, "versions": {}, "git": None}


def make_run(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "coreset.jsonl").write_bytes(LINES)
    table = {
        "row": pa.array([0, 1, 2], pa.int64()), "id": ["0", "1", "2"], "score": pa.array([0.1, 0.9, 0.5], pa.float32()),
        "rank": pa.array([3, 1, 2], pa.int64()), "selected": [False, True, True],
    }  # fmt: skip
    pq.write_table(pa.table(table), folder / "scores.parquet", compression="none")
    (folder / "manifest.json").write_bytes(text_of(base_manifest()))


def small_scores() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": ["1", "2"], "rank": [1, 2], "selected": [True, True]}), out, compression="none",
                   write_statistics=False, store_schema=False)  # fmt: skip
    return out.getvalue()


def manifest(work: Path) -> Task:
    run, train = work / "run", work / "train"
    make_run(run)
    make_run(train / "selection")
    trained = base_manifest()
    trained["config"].update(train={"epochs": 1, "seed": None, "model": None}, coreset={"path": None}, evaluation={})
    trained["inputs"].update(coreset={"sha256": "cd" * 32, "rows": 2})
    numbers = {"eval/nll": 1.5, "eval/nll_before": 2.0, "eval/nll_low": 1.4, "train/tokens": 10, "selection/records": 2}
    prediction = {"id": "a", "num_tokens": 3, "nll": 1.5, "correct": True, "choice_correct": None}

    def task(data: bytes) -> bool:
        source = Bytes(data)
        kind = source.number(5)
        folder = run if kind < 2 else train
        if kind == 0:
            (run / "manifest.json").write_bytes(structured(source.rest))
        elif kind == 1:
            (run / "manifest.json").write_bytes(text_of(edited(base_manifest(), source)))
        else:
            (train / "manifest.json").write_bytes(text_of(edited(trained, source) if kind == 2 else trained))
            (train / "metrics.json").write_bytes(text_of(edited(numbers, source) if kind == 3 else numbers))
            (train / "predictions.jsonl").write_bytes(text_of(edited([prediction], source)[0]) if kind == 4 else b"")
        if len(data) % 16 == 0:  # composing settings takes as long as all the rest together
            try:
                open_run(folder, work)
            except UserError as error:
                refusal(error)
        if kind == 4:
            try:
                read_predictions(train / "predictions.jsonl")
            except BrokenRun as error:
                return refusal(error)
        runs, broken = read_runs([Found(folder, "run")])
        for item in runs:
            _ = item.settings, item.seed_text, item.scorer, item.trainee, item.budget, item.measurements, item.method
            _ = item.coreset.pool, item.coreset.mean_tokens, item.train_seconds, item.select_seconds
        return bool(runs) or refusal(ValueError(broken[0][1]))

    return task


def comparing(work: Path) -> Task:
    folders = [work / "runs" / name for name in ("0", "1")]
    for folder in folders:
        make_run(folder)
    other = base_manifest()
    other["config"]["method"]["name"] = "random"
    (folders[1] / "manifest.json").write_bytes(text_of(other))
    mark = "<img src=x onerror=alert(1)>"

    def task(data: bytes) -> bool:
        source = Bytes(data)
        value = edited(base_manifest(), source)
        if source.number(2) and isinstance(value.get("config"), dict):
            value["config"]["note"] = mark
        (folders[0] / "manifest.json").write_bytes(text_of(value))
        try:
            report = compare(folders, all_pairs=True, samples=100, seed=0)
        except UserError as error:
            return refusal(error)
        text = visible(report_text(report))
        assert not any(unicodedata.category(letter) == "Cc" for letter in text if letter not in "\n\t")
        write_rows(run_rows(report), work / "compare")
        if report.comparisons:
            write_rows(difference_rows(report.comparisons), work / "compare_differences")
        page = write_comparison(report, work).read_text(encoding="utf-8")
        assert mark not in page
        assert "</script><b>" not in page
        return True

    return task


def exporting(work: Path) -> Task:
    run, out = work / "run", work / "out"
    make_run(run)
    good = {name: (run / name).read_bytes() for name in ("coreset.jsonl", "scores.parquet", "manifest.json")}

    def task(data: bytes) -> bool:
        source = Bytes(data)
        name = list(good)[source.number(3)]
        form = ("jsonl", "messages", "alpaca", "parquet")[source.number(4)]
        for other, content in good.items():
            (run / other).write_bytes(content)
        if name == "coreset.jsonl":
            (run / name).write_bytes(structured(source.rest))
        elif name == "manifest.json":
            (run / name).write_bytes(text_of(edited(base_manifest(), source)))
        else:
            (run / name).write_bytes(source.rest)
        shutil.rmtree(out, ignore_errors=True)
        try:
            export(run, form, out)
        except UserError as error:
            assert not (out / "export.json").exists()
            return refusal(error)
        return True

    return task


# --- store, models ------------------------------------------------------------------------------------------


def storing(work: Path) -> Task:
    root, outside = work / "store", work / "outside"
    key = StageKey("score", 1, {"a": 1})
    outside.write_bytes(b"not the store's")
    content = b"content"
    base = {
        "key": key.description, "created": 1.0, "facts": {"seconds": 1.0},
        "files": {"data.bin": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
    }  # fmt: skip

    def task(data: bytes) -> bool:
        source = Bytes(data)
        kind = source.number(3)
        store = Store(root)
        entry = store.path_of(key)
        entry.mkdir(parents=True, exist_ok=True)
        (entry / "data.bin").write_bytes(content)
        receipt = structured(source.rest)
        if kind:
            value = edited(base, source)
            if kind == 1:
                value["seal"] = seal_of(value)
            receipt = text_of(value)
        (entry / RECEIPT).write_bytes(receipt)
        for item in items(root):
            damage(root, item)
            with contextlib.suppress(StoreError):
                json.dumps(receipt_of(item.path))
        found = Store(root).find(key)
        assert outside.read_bytes() == b"not the store's"
        assert (found is not None) == entry.exists()
        return found is not None

    return task


def model(work: Path) -> Task:
    folder = work / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    settings = ModelSettings(path=str(folder))
    base = {"model_type": "llama", "num_hidden_layers": 4, "auto_map": None, "text_config": {"n_layer": 3}}

    def task(data: bytes) -> bool:
        source = Bytes(data)
        content = text_of(edited(base, source)) if source.number(2) else structured(source.rest)
        (folder / "config.json").write_bytes(content)
        try:
            config = read_config(folder, settings)
            assert not config.get("auto_map")
            assert 0 < config_layers(config, folder) <= 10_000
        except UserError as error:
            return refusal(error)
        return True

    return task


def adapter_bytes(header: Any, numbers: bytes) -> bytes:
    text = header if isinstance(header, bytes) else text_of(header)
    return struct.pack("<Q", len(text)) + text + numbers


ADAPTER = {
    "base.q.lora_A.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
    "base.q.lora_B.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [8, 16]},
}
WEIGHTS = struct.pack("<4f", 1, 2, 3, 4)


def adapter(work: Path) -> Task:
    folder = work / "adapter"
    folder.mkdir()
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"

    def task(data: bytes) -> bool:
        source = Bytes(data)
        kind = source.number(4)
        config.write_bytes(structured(source.rest) if kind == 0 else b'{"peft_type": "LORA"}')
        if kind == 1:
            weights.write_bytes(source.rest)
        elif kind == 2:
            weights.write_bytes(adapter_bytes(edited(ADAPTER, source), WEIGHTS + source.rest[:16]))
        else:
            weights.write_bytes(adapter_bytes(ADAPTER, WEIGHTS))
        try:
            check_adapter(folder)
        except UserError as error:
            return refusal(error)
        return True

    return task


# --- pages --------------------------------------------------------------------------------------------------

HARMFUL = {"\u2028", "\u2029", "\u202e", "\u202a", "\u2066", "\u2069", "\u200b", "\ufeff", "\x1b", "\x00", "\x9b"}


def page(work: Path) -> Task:
    def task(data: bytes) -> bool:
        source = Bytes(data)
        texts = [
            source.rest.decode("utf-8", "surrogateescape"),
            source.rest.decode("utf-16-le", "surrogatepass" if len(source.rest) % 2 == 0 else "replace"),
        ]
        value = {"text": texts, texts[0][:50]: finite(source.value())}
        block = data_block(value)
        assert "<" not in block
        assert not HARMFUL & set(block)
        assert json.loads(block) == json.loads(json.dumps(value))
        block.encode()
        for text in texts:
            shown = visible(text)
            shown.encode()
            assert not HARMFUL & set(shown)
        return True

    return task


def finite(value: Any) -> Any:
    """JSON that a page is given holds no NaN: its makers see to that."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list) else value


# --- the table ----------------------------------------------------------------------------------------------

TARGETS: dict[str, Callable[[Path], Task]] = {
    "jsonl": jsonl, "layouts": layouts, "gz": packed, "parquet": parquet, "render": render, "template": template,
    "overrides": overrides, "method": method, "manifest": manifest, "compare": comparing, "export": exporting,
    "store": storing, "model": model, "adapter": adapter, "page": page,
}  # fmt: skip


def record_examples() -> list[bytes]:
    records = [
        '{"prompt": "a", "response": "b", "id": 3}\n{"prompt": "c", "response": "d"}',
        '{"instruction": "a", "input": "", "output": "b", "history": [["a", "b"]], "system": "s"}',
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "tool_calls": [1]}]}',
        '{"a": {"a": "x"}, "response": "y", "meta": "a"}',
        '{"prompt": ' + "[" * 1500 + "]" * 1500 + ', "response": "b"}',
        '{"prompt": "\\ud800", "response": "\\u0000", "id": ' + "9" * 4300 + "}",
        '\ufeff{"prompt": "a", "prompt": "b", "response": 1e400}\n\n\r\n',
    ]
    built = [bytes([place, 2, place, *range(place, place + 12)]) for place in range(12)]
    return [b"\0\0" + text.encode() for text in records] + [bytes([1, 1, *range(len(PIECES))]), *built]


def parquet_examples() -> list[bytes]:
    plain = {"prompt": ["a", "b"], "response": ["c", "d"]}
    tables = [
        pa.table(plain),
        pa.table({**plain, "n": pa.array([1, 2], pa.timestamp("us", tz="UTC")), "d": pa.array([1, None], pa.decimal128(9, 2))}),
        pa.table({"messages": pa.array([[{"role": "user", "content": "a"}]] * 2)}),
        pa.table({**plain, "m": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int8())), "x": pa.array([b"a", b"\xff"])}),
        pa.table({**plain, "far": pa.array([2**62, -(2**62)], pa.timestamp("us")), "span": pa.array([2**62, 1], pa.duration("s"))}),
    ]  # fmt: skip
    found = []
    for place, table in enumerate(tables):
        out = io.BytesIO()
        pq.write_table(table, out, compression=("none", "snappy", "gzip", "zstd", "none")[place], use_dictionary=place % 2 == 0,
                       write_statistics=False)  # fmt: skip
        found.append(out.getvalue())
    return found


EXAMPLES: dict[str, Callable[[], list[bytes]]] = {
    "jsonl": record_examples,
    "layouts": lambda: [bytes(range(60)), b"\1\2\0\7\0\1\7\3", b"\0\7\0\0\0\5\7\3\2\1\0\1"],
    "gz": lambda: [b"\1" + gzip.compress(item, mtime=0) for item in record_examples()] + [b"\0" + item for item in record_examples()],
    "parquet": parquet_examples,
    "render": lambda: [
        bytes([place]) + text
        for place in range(7)
        for text in (b"hello\2there", b"\0rules\1ask\2<think>\nhm\n</think>\n\nanswer", b"\1 \n\2\n\3tool\2\xf0\x9f\x98\x80<|im_end|>")
    ],
    "template": lambda: [style.template.encode() for style in STYLES.values()]
    + [b"{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}", b"{{ ''.__class__.__mro__ }}", b"{{ 9 ** 9 ** 9 }}"],
    "overrides": lambda: [
        b"smethod=random\nselection.count=3", b"ttrain.epochs=1\npool=jsonl\npool.path=x", b"s+x._target_=os.system",
        b"spool.where={a: [1, b]}\ntarget.num_examples=null", b"smodel.path=${oc.env:HOME}\nseed=1e3", b"s~pooler\n++a.b=c",
    ],
    "method": lambda: [bytes([place, 1, 2, 3, 4, 5]) for place in range(12)],
    "manifest": lambda: [bytes([place, 0, 1, 2, 3, 4, 5, 6, 7, 8]) for place in range(5)] + [b"\0\0" + text_of(base_manifest())],
    "compare": lambda: [bytes([place, 1, 2, 3, 4, 5, 6, 7]) for place in range(8)],
    "export": lambda: [bytes([0, place]) + item for place in range(4) for item in record_examples()[:5]]
    + [b"\1\3" + small_scores(), b"\2\0\1\2\3\4\5"],
    "store": lambda: [bytes([place, 0, 1, 2, 3, 4, 5, 6]) for place in range(3)] + [b'\0\0{"files": {}, "facts": {}}'],
    "model": lambda: [bytes([place, 0, 1, 2, 3, 4]) for place in range(2)] + [b'\0\0{"num_hidden_layers": 4, "auto_map": {}}'],
    "adapter": lambda: [b"\0\0{}", b"\1" + adapter_bytes(ADAPTER, WEIGHTS), b"\2\0\1\2\3\4\5", b"\3"],
    "page": lambda: ["</script><!--\u2028\u202e\x1b[2J<b>&amp;\ufeff".encode(), b"\xed\xa0\x80\xff", b"{{ x }}"],
}  # fmt: skip
