"""Records of random hostile text all the way through a selection: its pages, its explanations, its exports."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "report"))
from rooms import Page, Room

from trim_lightning.cli.compare import main as compare_main
from trim_lightning.cli.explain import main as explain_main
from trim_lightning.cli.export import main as export_main

pytestmark = pytest.mark.faults
HARMFUL = {
    *"\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\u200e\u200f\ufeff\x00\x07\x1b\x9b\x7f"
}
PARTS = [
    "<script>", "</script>", "<!--", "-->", "<img src=x onerror=alert(1)>", "</title>", "<svg/onload=alert(1)>", "]]>", "&lt;",
    "&#60;", '"', "'", "`", "${7*7}", "{{7*7}}", "{% raw %}", "<|im_start|>", "<|im_end|>", "javascript:alert(1)", "\\u003c",
    "\ud800", "\udfff", "\x1b[31m", "\x1b]8;;http://x\x07", "%0A", "\r\n", "\n", "\t", " ", "a", "word", "é", "日本", "\U0001f469‍🚀",
    "=cmd|' /C calc'!A0", "../../etc/passwd", "z̸̡a̶l̵g̷o", *HARMFUL,
]  # fmt: skip


def text(generator: random.Random) -> str:
    """Parts of attacks in any order."""
    return "".join(generator.choices(PARTS, k=generator.randrange(1, 30)))


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    """A tiny model and three hundred records, every field hostile."""
    made = Room(tmp_path_factory.mktemp("room"))
    generator = random.Random(7)
    records = [
        {"id": text(generator) + str(place), "prompt": text(generator) + " how many eggs", "response": text(generator) + " boxes",
         "kind": text(generator)[:40], "n": float("nan"), text(generator): {text(generator): text(generator)}}
        for place in range(300)
    ]  # fmt: skip
    (made.root / "hostile.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return made


@pytest.fixture(scope="module")
def run(room: Room) -> Path:
    """A selection of every record, to every record."""
    return room.select_hostile("fuzzed", "target.num_examples=20")


def check_page(path: Path) -> None:
    """Nothing of the data is an element, an attribute that acts, or a character that hides."""
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert [name for name, _ in page.elements].count("script") == 3  # the data, the charts, ours
    assert not HARMFUL & set(source)
    for name, attributes in page.elements:
        assert name not in ("img", "iframe", "object", "base") or str(attributes.get("src", "data:")).startswith(
            "data:"
        )
        for key, value in attributes.items():
            assert not key.startswith("on")
            assert not str(value).lower().startswith("javascript:")
    block = source.split('type="application/json"')[1].split("</script>")[0]
    assert "<" not in block.split(">", 1)[1]
    json.dumps(page.data)


def test_the_report(run: Path) -> None:
    check_page(run / "report.html")


def test_explanations(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row in range(0, 300, 20):
        assert (
            explain_main([str(run), "--row", str(row), "--html", str(tmp_path / "page.html"), "--color", "never"]) == 0
        )
        check_page(tmp_path / "page.html")
        shown = capsys.readouterr().out
        assert not [letter for letter in shown if unicodedata.category(letter) == "Cc" and letter not in "\n\t"]
        assert not HARMFUL & set(shown)


def test_the_comparison(run: Path, room: Room, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = room.select_hostile("fuzzed_random", "method=random")
    assert compare_main([str(run), str(other), "--all-pairs", "--bootstrap", "100", "--output", str(tmp_path)]) == 0
    check_page(tmp_path / "compare.html")
    assert not HARMFUL & set(capsys.readouterr().out)


@pytest.mark.parametrize("form", ["jsonl", "messages", "alpaca", "parquet"])
def test_exports_can_be_read_again(form: str, run: Path, tmp_path: Path) -> None:
    assert export_main([str(run), "--format", form, "--output", str(tmp_path)]) == 0
    for path in tmp_path.glob("*.jsonl"):
        lines = path.read_bytes().split(b"\n")
        assert [json.loads(line) for line in lines[:-1]]
        assert lines[-1] == b""
