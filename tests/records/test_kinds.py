"""The kind of a record."""

from __future__ import annotations

from trim_lightning.records.kinds import KIND_FIELDS, count_kinds, kind_field
from trim_lightning.records.word_file import split_words, words_of


def test_the_first_usual_field_that_a_record_has_is_its_kind() -> None:
    record = {"task": "t", "source": "s", "family": "f", "prompt": "p"}
    found = []
    while (field := kind_field(record)) is not None:
        found.append(field)
        del record[field]
    assert found == [name for name in KIND_FIELDS if name in ("task", "source", "family")]


def test_records_without_the_field_are_not_counted() -> None:
    assert count_kinds([{"source": "a"}, {"task": "b"}, {"source": "a"}, {"source": 3}], "source") == {"a": 2, "3": 1}


def test_scripts_without_blanks_are_cut_by_letters() -> None:
    assert words_of("Price: 苹果多少钱?") == ["price", ":", "苹果", "果多", "多少", "少钱", "?"]
    assert words_of("กิน ab") == ["กิ", "ิน", "ab"]
    assert words_of("Été, naïve") == ["été", ",", "naïve"]
    assert split_words("ab 巴黎 c") == ["ab", "巴", "黎", "c"]
    assert split_words("un été") == ["un", "été"]
