"""From a ranking to a coreset: budgets, caps, duplicates, length bounds, and what they say when they leave less."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from running import selection
from trim_lightning.errors import UserError
from trim_lightning.pipeline.checks import check_settings
from trim_lightning.pipeline.select import warn_of_equal_scores
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile
from trim_lightning.records.shared import text_of
from trim_lightning.selection.budget import check_budget, select_rows
from trim_lightning.selection.ranking import ScoreTable
from trim_lightning.settings.schema import SelectionSettings, SelectSettings
from trim_lightning.store.ledger import Ledger

Pool = Callable[..., RecordFile]


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """Writes records (a text is the prompt of one) and opens them as a pool."""

    def write(*records: str | dict[str, Any]) -> RecordFile:
        lines = [{"prompt": record, "response": ""} if isinstance(record, str) else record for record in records]
        path = tmp_path / "pool.jsonl"
        path.write_text("".join(json.dumps({"prompt": "p", "response": "r"} | line) + "\n" for line in lines))
        return index(LineSource(path, label="pool.path=pool.jsonl", name="pool.jsonl", what="pool"), ReadOptions())

    return write


def table(lengths: list[int]) -> ScoreTable:
    """Scores that fall with the row."""
    tokens = np.array(lengths, dtype=np.int32)
    return ScoreTable(-np.arange(len(lengths), dtype=np.float32), tokens, tokens)


def chosen(records: RecordFile, *, lengths: list[int] | None = None, ledger: Ledger | None = None, **keys: Any) -> Any:
    """Selected rows of a pool whose order is its own."""
    settings = SelectionSettings(**keys)
    scores = table(lengths or [10] * len(records))
    return select_rows(settings, records, scores, np.arange(len(records)), ledger or Ledger()).tolist()


# ---------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("size", "keys", "expected"),
    [
        (100, {}, 5),
        (19, {}, 1),
        (100, {"fraction": 0.29}, 29),
        (3, {"fraction": 1.0}, 3),
        (100, {"count": 7}, 7),
        (100, {"tokens": 55}, 5),
        (100, {"tokens": 60}, 6),
        (100, {"tokens": 9}, 1),
        (5, {"tokens": 10_000}, 5),
    ],
)
def test_each_budget(size: int, keys: dict[str, Any], expected: int, pool: Pool) -> None:
    assert chosen(pool(*["x"] * size), **keys) == list(range(expected))


def test_unscored_records_count_in_n_and_are_never_taken(pool: Pool) -> None:
    records, ledger = pool(*["x"] * 40), Ledger()
    scores, order = table([10] * 40), np.arange(3)  # only three records have a rank
    settings = SelectionSettings(fraction=0.1)
    assert select_rows(settings, records, scores, order, ledger).tolist() == [0, 1, 2]
    assert ledger.warnings == ["only 3 of the 4 records of the budget could be selected"]


def test_a_first_record_above_the_token_budget_is_taken_with_a_warning(pool: Pool) -> None:
    ledger = Ledger()
    assert chosen(pool("a", "b"), lengths=[50, 1], tokens=20, ledger=ledger) == [0]
    assert ledger.warnings == ["the best record alone has 50 tokens, above selection.tokens=20"]


def test_a_token_budget_beyond_the_pool_is_told(pool: Pool) -> None:
    ledger = Ledger()
    assert chosen(pool("a", "b"), lengths=[50, 1], tokens=52, ledger=ledger) == [0, 1]
    assert ledger.warnings == ["selection.tokens=52: all 2 scored records have only 51; all are selected"]
    ledger = Ledger()
    assert chosen(pool("a", "b"), lengths=[50, 1], tokens=51, ledger=ledger) == [0, 1]
    assert ledger.warnings == []


def test_a_token_budget_that_filters_keep_out_of_reach_is_told(pool: Pool) -> None:
    for tokens, warnings in ((99, ["only 60 of the 99 tokens of the budget could be spent"]), (55, [])):
        ledger = Ledger()
        found = chosen(
            pool("a", "a", "b", "b", "a"), lengths=[50, 1, 10, 10, 9], tokens=tokens, dedup="exact", ledger=ledger
        )
        assert found == ([0, 2] if tokens == 99 else [0])
        assert ledger.warnings == warnings


def test_a_budget_in_response_tokens(pool: Pool) -> None:
    """Records are paid by what is handed in; without it by their content tokens."""
    settings = SelectionSettings(tokens=60, token_scope="response")
    scores, order, records = table([10] * 40), np.arange(40), pool(*["x"] * 40)
    assert len(select_rows(settings, records, scores, order, Ledger())) == 6
    assert len(select_rows(settings, records, scores, order, Ledger(), costs=np.full(40, 3))) == 20
    costs = np.where(np.arange(40) % 2, 3, 0)  # a record without a response teaches nothing and is not bought
    assert select_rows(settings, records, scores, order, Ledger(), costs=costs).tolist() == list(range(1, 40, 2))
    with pytest.raises(UserError, match="there is no budget in tokens"):
        check_settings(SelectSettings(selection=SelectionSettings(token_scope="response")))


def test_a_run_pays_for_responses_alone(tmp_path: Path, tiny_folder) -> None:
    record = {"prompt": "add the numbers three and four then divide by two " * 3, "response": "21"}
    (tmp_path / "pool.jsonl").write_text(20 * f"{json.dumps(record)}\n")
    selected = {}
    for scope in ("all", "response"):
        found = selection(
            "model=hf", f"model.path={tiny_folder('llama')}", "method=random", "pool=jsonl", "logger=none",
            f"pool.path={tmp_path / 'pool.jsonl'}", "selection.tokens=100", f"selection.token_scope={scope}",
            output_dir=tmp_path / scope, store_dir=tmp_path / "store",
        )  # fmt: skip
        selected[scope] = len(found.chosen)
        kind = {"all": "content", "response": "response"}[scope]
        assert f"100 {kind} tokens" in (tmp_path / scope / "report.html").read_text()
    assert selected["all"] < 5
    assert selected["response"] == 20


@pytest.mark.parametrize("names", [("fraction", "count"), ("count", "tokens"), ("fraction", "count", "tokens")])
def test_two_budgets_are_refused_by_name(names: tuple[str, ...]) -> None:
    settings = SelectSettings(selection=SelectionSettings(**dict.fromkeys(names, 1)))
    with pytest.raises(UserError, match="give one of them") as caught:
        check_settings(settings)
    assert all(f"selection.{name}=1" in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fraction": 0.0}, r"selection\.fraction=0.0: must be above 0"),
        ({"fraction": 1.5}, r"selection\.fraction=1.5: must be at most 1"),
        ({"fraction": float("nan")}, r"selection\.fraction=nan: must be a finite number"),
        ({"count": 0}, r"selection\.count=0: must be at least 1"),
        ({"cap": 2}, r"selection\.cap and selection\.cap_field go together"),
        ({"cap_field": "source"}, r"selection\.cap and selection\.cap_field go together"),
        ({"min_tokens": 9, "max_tokens": 3}, r"selection\.min_tokens=9 is above selection\.max_tokens=3"),
        ({"dedup": "nearly"}, r"selection\.dedup=nearly: must be one of none, exact, near; did you mean near\?"),
        ({"near_threshold": 0.0}, r"selection\.near_threshold=0.0: must be above 0"),
    ],
)
def test_impossible_settings_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(SelectSettings(selection=SelectionSettings(**keys)))


def test_a_count_above_the_pool_is_refused_with_its_size() -> None:
    check_budget(SelectionSettings(count=7), 7)
    with pytest.raises(UserError, match=r"selection\.count=8: the pool has only 7 records; ask for at most 7"):
        check_budget(SelectionSettings(count=8), 7)


# ------------------------------------------------------------------------------------------------ caps


def test_a_cap_holds_for_every_value_of_a_field(pool: Pool) -> None:
    sources = ["a", "a", "b", "a", "b", "b", "c"]
    records = pool(*({"source": source} for source in sources))
    assert chosen(records, count=5, cap_field="source", cap=2) == [0, 1, 2, 4, 6]
    assert chosen(records, count=3, cap_field="source", cap=1) == [0, 2, 6]


def test_values_are_compared_as_text_and_fields_may_be_nested(pool: Pool) -> None:
    records = pool(*({"meta": {"kind": kind}} for kind in (1, "1", None, 2)))
    assert chosen(records, count=4, cap_field="meta.kind", cap=1) == [0, 2, 3]


def test_a_cap_that_leaves_too_little_is_said(pool: Pool) -> None:
    ledger = Ledger()
    records = pool(*({"source": "a"} for _ in range(9)))
    assert chosen(records, count=4, cap_field="source", cap=2, ledger=ledger) == [0, 1]
    assert ledger.warnings == ["only 2 of the 4 records of the budget could be selected"]


def test_a_record_without_the_field_is_named(pool: Pool) -> None:
    records = pool({"source": "a"}, {})
    with pytest.raises(
        UserError, match=r"selection\.cap_field=source: pool\.path=pool\.jsonl line 2 has no such field"
    ):
        chosen(records, count=2, cap_field="source", cap=1)


# --------------------------------------------------------------------------------------------- lengths


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12),
    low=st.none() | st.integers(1, 20),
    high=st.none() | st.integers(1, 20),
)
def test_length_bounds_are_inclusive(lengths: list[int], low: int | None, high: int | None) -> None:
    records = [row for row, length in enumerate(lengths) if (low or 0) <= length <= (high or 99)]
    settings = SelectionSettings(count=len(lengths), min_tokens=low, max_tokens=high)
    got = select_rows(settings, object(), table(lengths), np.arange(len(lengths)), Ledger())  # type: ignore[arg-type]
    assert got.tolist() == records


def test_a_long_record_outside_the_bounds_does_not_end_a_token_budget(pool: Pool) -> None:
    assert chosen(pool(*"abcd"), lengths=[10, 500, 10, 10], tokens=25, max_tokens=100) == [0, 2]


# ------------------------------------------------------------------------------------------ duplicates


def test_exact_duplicates_of_better_records_are_dropped(pool: Pool) -> None:
    records = pool("Add 2 and 3.", "add  2 and 3.\n", "Add 2 and 4.", "ADD 2\tAND 3.", "Add 2 and 3")
    assert chosen(records, count=5, dedup="exact") == [0, 2, 4]
    assert chosen(records, count=5) == [0, 1, 2, 3, 4]


def test_all_turns_count_in_a_records_text(pool: Pool) -> None:
    records = pool(
        {"prompt": "Add", "response": "Five"},
        {"prompt": "Add", "response": "Six"},
        {"prompt": "add ", "response": " five"},
        {"prompt": "", "response": ""},
        {"prompt": " ", "response": "\n"},
    )
    assert text_of(records.record(2).turns) == "add five"
    assert chosen(records, count=5, dedup="exact") == [0, 1, 3]


def test_a_duplicate_of_a_record_that_was_not_taken_may_be_taken(pool: Pool) -> None:
    records = pool({"prompt": "same", "source": "a"}, {"prompt": "x", "source": "a"}, {"prompt": "same", "source": "b"})
    order = np.array([1, 0, 2])
    settings = SelectionSettings(count=3, dedup="exact", cap_field="source", cap=1)
    assert select_rows(settings, records, table([1] * 3), order, Ledger()).tolist() == [1, 2]


def words(first: int, last: int) -> str:
    return " ".join(f"w{number}" for number in range(first, last))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.97, 1.0])
def test_near_duplicates_are_those_above_the_threshold(threshold: float, pool: Pool) -> None:
    pytest.importorskip("datasketch")
    # a shift by n words of 202 leaves (200 - n) of (200 + n) word triples in common
    shifts = [0, 0, 5, 15, 40, 100, 190]
    texts = [f"{words(shift, shift + 202)}" for shift in shifts]
    similar = [(200 - shift) / (200 + shift) for shift in shifts]
    for row in range(1, len(texts)):
        selected = chosen(pool(texts[0], texts[row]), count=2, dedup="near", near_threshold=threshold)
        assert (selected == [0]) == (similar[row] >= threshold), (similar[row], threshold)


def test_near_duplicates_of_many_different_texts_are_found(pool: Pool) -> None:
    pytest.importorskip("datasketch")
    generator = np.random.default_rng(0)
    texts = [" ".join(f"v{number}" for number in generator.integers(0, 1000, 60)) for _ in range(60)]
    copies = [text.upper() + " end" for text in texts]
    selected = chosen(pool(*texts, *copies, "", "", "two words", "Two  Words"), count=124, dedup="near")
    assert selected == [*range(60), 120, 122]


def test_the_missing_library_is_named(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"pip install 'trim-lightning\[dedup\]'"):
        chosen(pool("a"), count=1, dedup="near")


# ---------------------------------------------------------------------------------- everything together


def test_filters_work_together_and_a_refused_record_leaves_no_trace(pool: Pool) -> None:
    records = pool(
        {"prompt": "long one", "source": "a"},  # too long: must not count against the cap or as seen text
        {"prompt": "one", "source": "a"},
        {"prompt": "one", "source": "b"},  # a duplicate: must not count against b's cap
        {"prompt": "two", "source": "b"},
        {"prompt": "three", "source": "a"},  # a is full
        {"prompt": "long one", "source": "c"},
    )
    keys = {"cap_field": "source", "cap": 1, "dedup": "exact", "max_tokens": 20}
    assert chosen(records, lengths=[99, 10, 10, 10, 10, 10], count=6, **keys) == [1, 3, 5]
    assert chosen(records, lengths=[99, 10, 10, 10, 10, 10], tokens=25, **keys) == [1, 3]


@pytest.mark.parametrize(("scores", "told"), [([1, 1, np.nan], 1), ([1, 2, np.nan], 0), ([1, np.nan, np.nan], 0)])
def test_scores_that_tell_no_record_from_another_are_a_warning(scores: list[float], told: int) -> None:
    ledger = Ledger(quiet=True)
    warn_of_equal_scores(np.array(scores, dtype=np.float32), False, ledger)
    assert len(ledger.warnings) == told
    assert all("scores are equal" in line for line in ledger.warnings)


def test_near_duplicates_in_scripts_without_blanks(pool: Pool) -> None:
    pytest.importorskip("datasketch")
    records = pool("今天的苹果多少钱一斤呢请问老板", "今天的苹果多少钱一斤呢请问老板啊", "法国的首都是哪里谁知道呢")
    assert chosen(records, count=3, dedup="near", near_threshold=0.7) == [0, 2]
