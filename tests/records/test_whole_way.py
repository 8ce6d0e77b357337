"""From any layout in any container through any template: the scoped tokens are the record's own text, all of it."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_nothing_unsaid import INSIDE
from test_shapes import SHAPES as WHOLE
from test_sources import CountingSpool, open_pool
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trim_lightning.tokens.rendering import PROMPT, RESPONSE, ChatRenderer, Encoded

SHAPES = {**WHOLE, **{name: INSIDE[name] for name in ("system in a pair", "refusal", "hh-rlhf", "guanaco")}}
START = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TEMPLATES = {
    "none": None,
    "plain": START + "{{ m.content }}<|im_end|>\n{% endfor %}",
    "trims": START + "{{ m.content | trim }}<|im_end|>{% endfor %}",
    "parts": START + "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}",
    "strict": "{% for m in messages %}{% if m.role in ['system', 'tool'] %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}",
}


def as_csv(path: Path, record: dict[str, Any]) -> None:
    cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in record.items() if value}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(cells))
        writer.writeheader()
        writer.writerow(cells)


CONTAINERS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "pool.jsonl": lambda path, record: path.write_text(json.dumps(record)),
    "pool.json": lambda path, record: path.write_text(json.dumps([record], indent=1)),
    "pool.jsonl.gz": lambda path, record: path.write_bytes(gzip.compress(json.dumps(record).encode())),
    "pool.csv": as_csv,
    "pool.parquet": lambda path, record: pq.write_table(pa.Table.from_pylist([record]), path),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=engine)


TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scoped_tokens_are_the_records_own_text(tmp_path: Path, shape: str, container: str) -> None:
    record, expected = SHAPES[shape]
    if container == "pool.parquet":
        if shape == "tool result parts":
            pytest.skip("Arrow has no column of texts and lists")
        record = {name: value for name, value in record.items() if value != {}}  # nor an empty object
    CONTAINERS[container](tmp_path / container, record)
    file = open_pool(CountingSpool(tmp_path / "spool"), "file", tmp_path / container)
    for name, template in TEMPLATES.items():
        (encoded,) = ChatRenderer(TOKENIZER, template).encode([file.record(0).turns], 4096)
        assert isinstance(encoded, Encoded), (name, encoded)
        for role, kinds in ((PROMPT, ("system", "user", "tool")), (RESPONSE, ("assistant",))):
            text = TOKENIZER.decode(encoded.token_ids[np.flatnonzero(encoded.roles == role)].tolist())
            assert text == "".join(said for kind, said in expected if kind in kinds), name


@pytest.mark.slow
def test_the_templates_that_trl_ships(capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed")
    script = Path(__file__).parents[2] / "benchmarks" / "chat_templates.py"
    spec = importlib.util.spec_from_file_location("chat_templates", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(Path(found.origin).parent / "chat_templates") == 0, capsys.readouterr().out
