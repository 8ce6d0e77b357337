"""Escaping, token texts, distributions and mixes, each on its own."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rooms import HOSTILE

from tiny_models import build_tiny_tokenizer
from trim_lightning.console.visible import visible
from trim_lightning.report.distributions import histogram, length_histogram, quantiles_of
from trim_lightning.report.mix import count_fields, counted_rows, order_values
from trim_lightning.report.page import HOME, data_block, digest, page_assets
from trim_lightning.report.selection_page import saliency_words
from trim_lightning.report.token_texts import TokenTexts

# Observable Plot 0.6.17 as `make vendor` bundles it; renew both together
PLOT_SHA256 = "9c31e8a1b3cb78fe1356f2fe2d4e1a0cf649661030b4ec76abfc0b39594e9d8c"


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_a_data_block_holds_any_text_and_no_markup(text: str) -> None:
    block = data_block({"text": text})
    assert "<" not in block
    assert json.loads(block) == {"text": text}
    block.encode()


def test_plain_text_stands_in_a_data_block_as_it_is() -> None:
    assert "café 日本語 👩 שלום & > '" in data_block("café 日本語 👩 שלום & > '")


@pytest.mark.parametrize(
    "text", ["\x00", "\x1b", "\x7f", "\x9b", "\u202e", "\u2066", "\u200f", "\ufeff", "\ud800", "\U000e0041"]
)
def test_what_cannot_be_seen_is_written_out(text: str) -> None:
    shown = visible(f"a{text}b")
    assert text not in shown
    assert shown[0] == "a"
    assert shown[-1] == "b"
    assert len(shown) > 2


def test_letters_of_all_scripts_and_line_breaks_stay() -> None:
    text = "a\n\tb é 日本 שלום 🇦🇹"
    assert visible(text) == text


@pytest.mark.parametrize("text", [text for name, text in HOSTILE.items() if name != "long"])
def test_pieces_make_up_the_text_of_a_byte_level_tokenizer(text: str) -> None:
    backend = build_tiny_tokenizer().backend_tokenizer
    ids = backend.encode(text).ids
    pieces = TokenTexts(backend).pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == backend.decode(ids, skip_special_tokens=False)
    assert "\ufffd" not in "".join(pieces)


def test_a_character_over_several_tokens_stands_at_the_first() -> None:
    backend = build_tiny_tokenizer().backend_tokenizer
    ids = backend.encode("a日b").ids
    assert len(ids) == 5  # a byte each
    assert TokenTexts(backend).pieces(ids) == ["a", "日", "", "", "b"]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    backend = build_tiny_tokenizer().backend_tokenizer
    assert TokenTexts(backend).pieces(backend.encode("a日").ids[:-1]) == ["a", "\ufffd", ""]


def test_sentencepiece_like_decoders_keep_their_spaces() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "[x]": 2}, unk_token="[x]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    ids = backend.encode("one two two").ids
    assert TokenTexts(backend).pieces(ids) == ["one", " two", " two"]


def test_a_class_that_is_part_of_a_character_is_named_by_its_vocabulary_entry() -> None:
    backend = build_tiny_tokenizer().backend_tokenizer
    token = backend.encode("日").ids[0]
    assert TokenTexts(backend).name(token) == backend.id_to_token(token)


def test_histograms_count_every_finite_value_once() -> None:
    values = {"left": np.array([0.0, 0.5, np.nan, 1.0], np.float32), "picked": np.array([0.25], np.float32)}
    found = histogram(values, bins=4)
    assert found is not None
    assert {name: sum(counts) for name, counts in found.counts.items()} == {"left": 3, "picked": 1}
    assert found.edges == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert histogram({"left": np.array([np.nan])}) is None


def test_scores_that_are_all_equal_have_a_histogram() -> None:
    found = histogram({"left": np.full(5, 0.3), "picked": np.array([])})
    assert found is not None
    assert sum(found.counts["left"]) == 5


def test_the_longest_records_share_the_last_bin() -> None:
    lengths = np.concatenate([np.arange(10, 1010), [100_000]])
    found = length_histogram({"pool": lengths, "coreset": lengths[-1:]})
    assert found is not None
    assert found.overflow
    assert found.edges[-1] < 2_000
    assert sum(found.counts["pool"]) == 1001
    assert found.counts["coreset"][-1] == 1
    assert all(float(edge).is_integer() for edge in found.edges)


def test_quantiles_leave_out_what_is_not_there() -> None:
    found = quantiles_of("pool", np.array([1.0, 2.0, 3.0, np.nan]))
    assert (found.size, found.mean, found.median) == (3, 2.0, 2.0)
    assert quantiles_of("none", np.array([np.nan])).mean is None


def test_fields_are_counted_one_level_deep_and_given_up_when_they_are_no_kind() -> None:
    records = [
        {
            "id": str(place),
            "kind": "ab"[place % 2],
            "meta": {"level": place % 3, "deep": {"x": 1}},
            "flag": True,
            "n": 0.5,
        }
        for place in range(300)
    ]
    counts = count_fields(records)
    assert counts["kind"] == {"a": 150, "b": 150}
    assert counts["meta.level"] == {"0": 100, "1": 100, "2": 100}
    assert set(counts) == {"kind", "meta.level", "flag"}


def test_a_large_pool_is_counted_on_evenly_spread_records() -> None:
    assert len(counted_rows(10_000)) == 10_000
    rows = counted_rows(1_000_000)
    assert len(rows) <= 10_000
    assert rows[-1] > 999_800


def test_values_are_ordered_by_what_was_picked() -> None:
    from collections import Counter

    assert order_values(Counter(b=2), Counter(a=9, b=3, c=1)) == [("b", 2), ("a", 0), ("c", 0)]


def test_the_charting_library_is_the_one_that_was_vendored() -> None:
    content = (HOME / "assets" / "plot.min.js").read_bytes()
    assert hashlib.sha256(content).hexdigest() == PLOT_SHA256
    licences = (HOME / "assets" / "plot.LICENSES.txt").read_text()
    assert "@observablehq/plot" in licences
    assert "d3-scale" in licences
    assert "Permission to use, copy, modify" in licences


def test_scripts_cannot_end_their_own_element() -> None:
    assets = page_assets()
    for script in (assets["plot"], assets["script"]):
        assert "</script" not in script.lower()
        assert "<!--" not in script
    assert "</style" not in assets["css"].lower()


def test_the_policy_lets_only_our_two_scripts_run() -> None:
    assets = page_assets()
    assert f"script-src 'sha256-{digest(assets['plot'])}' 'sha256-{digest(assets['script'])}';" in assets["policy"]
    assert assets["policy"].startswith("default-src 'none';")
    assert "unsafe-eval" not in assets["policy"]


@pytest.mark.parametrize("code", [0x00AD, 0x034F, 0x115F, 0x180E, 0x200C, 0x3164, 0xFFA0, 0xE0100])
def test_characters_without_a_shape_are_written_out(code: int) -> None:
    from trim_lightning.console.visible import visible
    from trim_lightning.report.page import data_block

    assert visible(f"a{chr(code)}b") == f"a⟨U+{code:04X}⟩b"
    assert chr(code) not in data_block({"text": chr(code)})


@pytest.mark.parametrize(
    ("weights", "attention", "told", "untold"),
    [
        ({"row_weight": 0.5, "column_weight": 0.5, "error_weight": 0}, None, "Row: ", "layer"),
        (
            {"row_weight": 0.5, "column_weight": 0},
            {"layers": [1, 3], "of": 4},
            "layers 1, 3, counted from 0, of 4.",
            "error",
        ),
        ({"row_weight": 0.5, "column_weight": 0.5, "error_weight": 1.0}, None, "beside them, with weight 1:", "alone"),
        (
            {"row_weight": 0, "column_weight": 0, "error_weight": 2.5},
            {"layers": [], "of": 4},
            "counts alone",
            "the same",
        ),
        ({"row_weight": 0, "column_weight": 0, "error_weight": 0}, {"layers": [], "of": 4}, "weighs the same", "Row: "),
        ({}, None, "Row: ", "error"),
    ],
)
def test_a_report_says_what_saliency_is_made_of(weights: Any, attention: Any, told: str, untold: str) -> None:
    words = " ".join(saliency_words(weights, attention))
    assert told in words
    assert untold not in words
