"""Records that try to break out of a page, runs on them, and pages of any size."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from composing import compose_select
from tiny_models import build_tiny_model, write_records
from trim_lightning.pipeline.select import select
from trim_lightning.report.facts import Candidate, SelectionFacts
from trim_lightning.settings.schema import SelectSettings

LONG_LINE = "long" + "x" * 100_000 + "line"
HOSTILE = {
    "script": "<script>document.title = 'broken'; window.broken = 1</script>",
    "closing": "</script><script>window.broken = 2</script>",
    "comment": "<!-- <script> --> <!--",
    "image": "<img src=x onerror=\"window.broken = 3\"> <svg onload='window.broken = 4'>",
    "quotes": "\" ' ` &quot; &lt;b&gt; \\ \\u003c {{ 7 * 7 }} {% raw %} ${7 * 7}",
    "arabic": "مرحبا بالعالم, how are you? שלום עולם",
    "override": "left \u202e thgir \u202c \u2066 isolated \u2069 \u200f",
    "emoji": "👩‍👩‍👧‍👦 🇦🇹 café 日本語 \U0001f9ec",
    "control": "nul \x00 bell \x07 escape \x1b[31m delete \x7f c1 \x9b separators \u2028\u2029 bom \ufeff",
    "long": LONG_LINE,
    "lines": "one\ntwo\r\nthree\ttab\n\n\nend",
}
KINDS = ("<u>first</u>", "second' onclick='x", "third\u202e")


def write_hostile(path: Path) -> list[dict[str, Any]]:
    """A pool whose texts, ids and fields are hostile."""
    records = [
        {"id": f"{name} <id>\"'\u202e", "prompt": f"Say: {text}", "response": text, "kind": KINDS[place % len(KINDS)]}
        for place, (name, text) in enumerate(HOSTILE.items())
    ]
    records += [
        {"id": str(place), "prompt": f"count eggs {place}", "response": f"boxes {place}", "kind": KINDS[place % 3]}
        for place in range(19)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


class Room:
    """A tiny model, a hostile pool, a plain one, and selections on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        build_tiny_model("llama", root / "model")
        self.hostile = write_hostile(root / "hostile.jsonl")
        write_records(root / "pool.jsonl", 60, seed=1, groups=("maths", "travel", "food"))
        write_records(root / "targets.jsonl", 6, seed=2, edge_cases=False, groups=("maths", "travel"))

    def settings(self, directory: Path, *overrides: str) -> SelectSettings:
        """Of a selection from the plain pool."""
        root = self.root
        return compose_select(
            [
                "model=hf", f"model.path={root / 'model'}", "model.dtype=float32", "pool=jsonl",
                f"pool.path={root / 'pool.jsonl'}", "target=jsonl", f"target.path={root / 'targets.jsonl'}",
                "warmup=none", "saliency.num_layers=3", "logger=none", "trainer=cpu", "max_length=256",
                f"paths.output_dir={directory}", f"paths.store_dir={root / 'store'}", *overrides,
            ]
        )  # fmt: skip

    def select(self, name: str, *overrides: str, command: str | None = "trim-select seed=0") -> Path:
        """Run a selection."""
        return select(self.settings(self.root / name, *overrides), command).directory

    def select_hostile(self, name: str, *overrides: str) -> Path:
        """Run a selection from the hostile pool that leaves nothing out; the targets are hostile too."""
        path = self.root / "hostile.jsonl"
        return self.select(
            name, f"pool.path={path}", f"target.path={path}", "selection.fraction=1", *overrides,
            command="trim-select '<script>window.broken = 5</script>'",
        )  # fmt: skip


class Page(HTMLParser):
    """What a browser would see in a page: elements, text outside scripts, and the data block."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._script: dict[str, str | None] | None = None
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        """A script ends."""
        self._script = None

    def handle_data(self, data: str) -> None:
        """Text, or a script's."""
        if self._script is None:
            self.text.append(data)
        else:
            self.scripts.append((self._script, data))

    @property
    def data(self) -> Any:
        """The data block."""
        (found,) = [text for attributes, text in self.scripts if attributes.get("type") == "application/json"]
        return json.loads(found)


def large_facts(facts: SelectionFacts, size: int) -> SelectionFacts:
    """The same report with a coreset of so many records of 1,500 characters."""
    text = "How many eggs fit into the boxes that are left? Count them one by one. "
    coreset = [
        Candidate(
            row=place, id=f"record-{place}", rank=place + 1, score=1 - place / size, mean=0.5, max=0.9, coverage=0.25,
            num_tokens=300, selected=True,
            turns=[("user", f"{place}: {text * 10}"), ("assistant", f"{text * 10}{place}")],
            fields={"subtask": "maths"},
        )
        for place in range(size)
    ]  # fmt: skip
    return SelectionFacts(**{**vars(facts), "coreset": coreset})
