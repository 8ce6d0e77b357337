"""The files that a selection and a comparison leave: what stands in them, and what does not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rooms import HOSTILE, KINDS, LONG_LINE, Page, Room, large_facts

from trim_lightning.cli.compare import main as compare_main
from trim_lightning.pipeline.select import select
from trim_lightning.report import selection_facts
from trim_lightning.report.selection_facts import candidate_places, random_rows
from trim_lightning.report.selection_page import selection_page


def read(run: Path) -> Page:
    """A run's report."""
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_the_report_says_what_the_other_files_say(plain: Path) -> None:
    data = read(plain).data
    scores = pq.read_table(plain / "scores.parquet").to_pandas()
    picked = scores[scores.selected].sort_values("rank")
    assert [item["id"] for item in data["coreset"]] == picked.id.tolist()
    assert [item["score"] for item in data["coreset"]] == pytest.approx(picked.score.tolist(), abs=1e-5)
    assert data["cut"] == pytest.approx(picked.score.iloc[-1])
    assert sum(data["scores"]["counts"]["picked"]) == 12
    assert sum(data["scores"]["counts"]["left"]) == int(scores.score.notna().sum()) - 12
    assert {name: sum(counts) for name, counts in data["lengths"]["counts"].items()} == {
        "pool": 60,
        "random": 12,
        "coreset": 12,
    }


def test_saliency_of_the_targets_is_that_of_the_file(plain: Path) -> None:
    data = read(plain).data
    targets = pq.read_table(plain / "target_tokens.parquet").to_pylist()
    assert [target["id"] for target in data["targets"]] == [target["id"] for target in targets]
    for shown, kept in zip(data["targets"], targets, strict=True):
        for short, name in (("s", "saliency"), ("r", "row_saliency"), ("c", "column_saliency")):
            assert [value is None for value in shown[short]] == [value is None for value in kept[name]]
            known = [value for value in kept[name] if value is not None]
            assert [value for value in shown[short] if value is not None] == pytest.approx(known, abs=1e-4)


def test_candidates_show_what_the_scoring_pass_found(room: Room) -> None:
    run = room.select("token_scores", "selection.count=12", "scoring.save_token_scores=true")
    data, lines = read(run).data, pq.read_table(run / "token_scores.parquet").to_pylist()
    for which, candidates in data["candidates"].items():
        assert candidates, which
        for item in candidates:
            view, line = item["view"], lines[item["row"]]
            assert len(view["t"]) == len(line["token_ids"])
            known = [value for value in line["similarity"] if value is not None]
            assert [value for value in view["s"] if value is not None] == pytest.approx(known, abs=1e-4)
            direct = [flag for flag, scoped in zip(line["direct"], line["scope"], strict=True) if scoped]
            assert [bool(flag) for flag in view["d"] if flag is not None] == direct
            for token, match, flag in zip(line["token_ids"], view["m"], view["d"], strict=True):
                assert flag is None or flag == (token == match)
                assert flag is None or str(match) in data["classes"]


def test_the_best_target_token_is_the_heaviest_of_the_matched_class(plain: Path) -> None:
    data = read(plain).data
    targets = {target["id"]: target for target in pq.read_table(plain / "target_tokens.parquet").to_pylist()}
    assert data["occurrences"]
    for name, place in data["occurrences"].items():
        weights = [
            weight
            for target in targets.values()
            for token, weight in zip(target["token_ids"], target["saliency"], strict=True)
            if token == int(name) and weight is not None
        ]
        assert place["saliency"] == pytest.approx(max(weights), abs=1e-4)
        assert targets[place["target"]]["token_ids"][place["place"]] == int(name)


def test_candidates_are_the_best_those_around_the_cut_and_the_last(plain: Path) -> None:
    candidates = read(plain).data["candidates"]
    ranks = {which: [item["rank"] for item in items] for which, items in candidates.items()}
    assert ranks["top"] == list(range(1, 9))
    assert ranks["borderline"] == list(range(9, 17))
    assert [item["in"] for item in candidates["borderline"]] == [True] * 4 + [False] * 4
    scored = int(pq.read_table(plain / "scores.parquet")["rank"].to_pandas().max())
    assert ranks["bottom"] == list(range(scored - 7, scored + 1))


def test_no_candidate_is_shown_twice_in_a_small_pool() -> None:
    order, picked = np.arange(5), np.array([True, True, False, False, False])
    places = candidate_places(order, picked, 8)
    rows = [row for part in places.values() for row in part]
    assert sorted(rows) == list(range(5))
    assert candidate_places(order, np.ones(5, dtype=bool), 8)["borderline"] == []


def test_the_random_coreset_is_a_draw_of_the_same_size() -> None:
    order = np.random.default_rng(3).permutation(100)[:80]
    drawn = random_rows(order, 12, seed=0)
    assert len(set(drawn.tolist())) == 12
    assert set(drawn.tolist()) <= set(order.tolist())
    assert drawn.tolist() == random_rows(order[::-1], 12, seed=0).tolist()


def test_every_section_and_link_is_there(plain: Path) -> None:
    page = read(plain)
    text = " ".join(page.text)
    assert "12 of 60 records, picked by TRIM" in text
    assert "trim-select seed=0" in text
    for heading in (
        "What was picked",
        "Is it what you wanted",
        "What the targets say",
        "Why these records",
        "Repeat it",
    ):
        assert heading in text
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a" and attributes.get("href")]
    for link in links:
        assert link is not None
        if not link.startswith("#"):
            assert (plain / link).is_file()
        else:
            assert any(attributes.get("id") == link[1:] for _, attributes in page.elements), link
    assert {"coreset.jsonl", "scores.parquet", "manifest.json", "fingerprints.safetensors"} <= set(links)


def test_the_mix_is_counted_by_every_field(plain: Path, room: Room) -> None:
    text = " ".join(" ".join(read(plain).text).split())
    records = [json.loads(line) for line in (plain / "coreset.jsonl").read_text().splitlines()]
    assert "Mix by subtask" in text
    share = sum(record["subtask"] == "maths" for record in records) / 12
    assert f"{100 * share:.1f} %" in text


def test_nothing_is_fetched_and_no_foreign_script_may_run(plain: Path) -> None:
    page = read(plain)
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "img")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "action", "srcset", "data"):
            assert not re.match(r"(https?:)?//|javascript:", attributes.get(name) or "")
    policies = [attributes for _, attributes in page.elements if attributes.get("http-equiv")]
    assert len(policies) == 1
    assert len(page.scripts) == 3
    assert "url(" not in (plain / "report.html").read_text().partition("</style>")[0]


def test_hostile_records_stand_in_the_file_whole_and_as_text(hostile: Path, room: Room) -> None:
    source = (hostile / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    coreset = {item["id"]: item for item in page.data["coreset"]}
    for record in room.hostile:
        turns = [text for _, text in coreset[record["id"]]["turns"]]
        assert turns == [record["prompt"], record["response"]]
        assert coreset[record["id"]]["f"]["kind"] == record["kind"]
    assert LONG_LINE in source
    assert HOSTILE["emoji"] in source
    assert HOSTILE["arabic"] in source


def test_no_markup_from_data_stands_in_the_file(hostile: Path, plain: Path) -> None:
    source = (hostile / "report.html").read_text(encoding="utf-8")
    for piece in ("<script>document", "<script>window", "<img", "<svg", "<!-- <script", "<id>", "<u>"):
        assert piece not in source, piece
    assert source.count("</script>") == 3
    # the same elements as a page without hostile data, but for their number
    kinds = {tag for tag, _ in read(plain).elements}
    assert {tag for tag, _ in Page(source).elements} <= kinds
    assert "7 * 7" in source
    assert "\x00" not in source
    assert "\u202e" not in source
    assert "\u2028" not in source


def test_hostile_fields_and_ids_are_escaped_in_the_tables(hostile: Path) -> None:
    text = " ".join(read(hostile).text)
    assert KINDS[0] in text
    assert "third⟨U+202E⟩" in text
    assert "<script>window.broken = 5</script>" in text  # the command


def test_2000_records_stay_under_8_megabytes(room: Room) -> None:
    facts = select(room.settings(room.root / "large", "selection.count=12")).report
    assert facts is not None
    page = selection_page(large_facts(facts, 2000))
    assert len(page.encode()) < 8_000_000
    assert len(Page(page).data["coreset"]) == 2000


def test_a_page_lists_the_best_of_a_coreset_that_is_too_large_for_it(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = room.select("whole", "selection.count=12")
    texts = [sum(len(text) for _, text in item["turns"]) for item in read(whole).data["coreset"]]
    room_for_five = sum(texts[:5]) + 5 * selection_facts.RECORD_CHARACTERS
    monkeypatch.setattr(selection_facts, "LISTED_CHARACTERS", room_for_five)
    page = read(room.select("bounded", "selection.count=12"))
    assert [item["id"] for item in page.data["coreset"]] == [item["id"] for item in read(whole).data["coreset"][:5]]
    assert "The best 5 of 12 picked records are listed" in " ".join(page.text)
    assert "picked records are listed" not in " ".join(read(whole).text)


@pytest.mark.parametrize("method", ["random", "longest", "bm25", "full"])
def test_methods_without_tokens_have_a_report_too(room: Room, method: str) -> None:
    overrides = () if method == "full" else ("selection.count=12",)
    run = room.select(f"method_{method}", f"method={method}", *overrides)
    page = read(run)
    assert page.data["targets"] == []
    assert all("turns" in item and "view" not in item for items in page.data["candidates"].values() for item in items)
    assert "it has no scores of tokens to show" in " ".join(page.text)


def test_groups_are_named_where_they_matched(room: Room) -> None:
    run = room.select("groups", "selection.count=12", "target.group_field=subtask")
    data = read(run).data
    groups = {item["view"]["group"] for items in data["candidates"].values() for item in items}
    assert groups <= {"maths", "travel"}
    scores = pq.read_table(run / "scores.parquet").to_pandas()
    for item in data["candidates"]["top"]:
        best = max(("maths", "travel"), key=lambda group: scores.loc[item["row"], f"score/{group}"])
        assert item["view"]["group"] == best
        for match in (match for match in item["view"]["m"] if match is not None):
            assert f"{best}/{match}" in data["occurrences"]


def test_a_pool_without_kinds_and_an_empty_coreset(room: Room) -> None:
    run = room.select("nothing", "selection.count=5", "selection.min_tokens=100000")
    page = read(run)
    assert page.data["coreset"] == []
    assert "No record was picked." in " ".join(page.text)


def test_the_report_can_be_left_out(room: Room) -> None:
    run = room.select("without", "selection.count=12", "report.enabled=false")
    assert not (run / "report.html").exists()
    assert (run / "coreset.jsonl").exists()


def test_an_old_report_does_not_survive_a_new_run(room: Room) -> None:
    run = room.select("twice", "selection.count=12")
    assert (run / "report.html").exists()
    room.select("twice", "selection.count=12", "report.enabled=false")
    assert not (run / "report.html").exists()


def test_a_fault_in_the_report_does_not_harm_the_selection(
    room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("trim_lightning.report.selection_page.selection_page", fail)
    run = room.select("fault", "selection.count=12")
    assert (run / "coreset.jsonl").exists()
    assert not (run / "report.html").exists()
    assert "report.html could not be made" in caplog.text


def test_the_home_directory_is_not_in_the_page(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(room.root))
    run = room.select("home", "selection.count=12", command=f"trim-select pool.path={room.root / 'pool.jsonl'}")
    source = (run / "report.html").read_text(encoding="utf-8")
    assert str(room.root) not in source
    assert "pool.path=.../pool.jsonl" in source


def test_making_a_page_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import trim_lightning.report.selection_page, trim_lightning.report.token_texts as pieces; "
        "from trim_lightning.report.page import page_assets, environment; page_assets(); environment(); "
        "import tokenizers; "
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_comparison_page(room: Room, tmp_path: Path) -> None:
    for place, method in enumerate(("trim", "random", "longest")):
        room.select(f"sweep/{place}", f"method={method}", "selection.count=12")
    assert compare_main([str(room.root / "sweep"), "--output", str(tmp_path)]) == 0
    assert "report.html" not in (tmp_path / "compare.html").read_text(encoding="utf-8")  # a way up may name a user
    assert compare_main([str(room.root / "sweep")]) == 0
    page = Page((room.root / "sweep" / "compare.html").read_text(encoding="utf-8"))
    data = page.data
    assert [point["method"] for point in data["points"]] == ["trim", "random", "longest"]
    rows = {name: set(pq.read_table(room.root / "sweep" / name / "scores.parquet").to_pandas().query("selected").row)
            for name in "012"}  # fmt: skip
    for first in range(3):
        for second in range(3):
            if first != second:
                total = data["exclusive"][f"{first}-{second}"]["total"]
                assert total == len(rows[str(first)] - rows[str(second)])
    shown = [key for pair in data["exclusive"].values() for _, key in pair["shown"]]
    assert set(shown) == set(data["records"])
    links = [attributes.get("href") for tag, attributes in page.elements if tag == "a"]
    assert sum("report.html" in (link or "") for link in links) == 3
    (axis,) = [axis for axis in data["axes"] if "method.name" in axis["name"]]
    levels = axis["levels"]["records in the coreset"]
    assert [(level["text"], level["runs"], level["mean"]) for level in levels] == [
        ("trim", 1, 12),
        ("random", 1, 12),
        ("longest", 1, 12),
    ]
    counts = [json.loads((room.root / "sweep" / name / "manifest.json").read_text())["counts"] for name in "012"]
    means = [level["mean"] for level in axis["levels"]["response tokens in the coreset"]]
    assert means == [count["selected_response_tokens"] for count in counts]


def test_comparison_of_hostile_runs_is_escaped(room: Room, tmp_path: Path) -> None:
    for place, method in enumerate(("longest", "random")):
        room.select_hostile(f"bad/{place}", f"method={method}", "selection.fraction=0.5")
    (room.root / "bad").rename(room.root / "bad<img>")
    assert compare_main([str(room.root / "bad<img>"), "--output", str(tmp_path)]) == 0
    source = (tmp_path / "compare.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "bad<img>" in " ".join(page.text)
    assert "img" not in {tag for tag, _ in page.elements}
    assert source.count("</script>") == 3
