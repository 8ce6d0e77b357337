"""``trim-explain``: the same numbers as the run's files, in the terminal and as a page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rooms import HOSTILE, Page, Room

from trim_lightning.cli.explain import main
from trim_lightning.errors import UserError
from trim_lightning.records.record import Turn
from trim_lightning.report.explain import explain_row, explain_text
from trim_lightning.report.explain_text import explanation_page, terminal_text
from trim_lightning.runs.reopened import open_run


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs the command and returns its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def warm(room: Room) -> Path:
    """A selection by a warmed-up scorer, on a store of its own."""
    store = room.root / "warm_store"
    return room.select(
        "warm", "selection.count=12", "warmup=lora", "warmup.epochs=1", "scoring.save_token_scores=true",
        f"paths.store_dir={store}",
    )  # fmt: skip


def test_a_picked_and_an_unpicked_record(plain: Path, said) -> None:  # type: ignore[no-untyped-def]
    scores = pq.read_table(plain / "scores.parquet").to_pandas().dropna(subset=["rank"]).set_index("rank")
    code, out, _ = said(plain, "--row", scores.row[3])
    assert code == 0
    assert f"Picked: rank 3 of {len(scores)}." in out
    code, out, _ = said(plain, "--id", scores.id[20])
    assert code == 0
    assert f"Not picked: rank 20 of {len(scores)}." in out
    assert f"{scores.score[12] - scores.score[20]:.4f} below the last picked record" in out
    assert "\x1b[" not in out


def test_the_parts_add_up(plain: Path) -> None:
    run = open_run(plain)
    found = explain_row(run, int(run.scores["row"][0].as_py()))
    candidate = found.candidate
    assert None not in (candidate.score, candidate.mean, candidate.max, candidate.coverage)
    parts = 0.5 * candidate.mean + 0.5 * candidate.max + 0.05 * candidate.coverage  # type: ignore[operator]
    assert candidate.score == pytest.approx(parts, abs=1e-5)
    assert candidate.view is not None
    known = [value for value in candidate.view.similarity if value is not None]
    assert max(known) == pytest.approx(candidate.max, abs=1e-4)
    assert sum(known) / len(known) == pytest.approx(candidate.mean, abs=1e-4)
    assert found.strongest[0].similarity == pytest.approx(candidate.max, abs=1e-4)


def test_a_filter_is_named_when_it_left_a_better_record_out(room: Room) -> None:
    run = open_run(room.select("capped", "selection.count=6", "selection.cap_field=subtask", "selection.cap=2"))
    scores = run.scores.to_pandas()
    last = scores[scores.selected]["rank"].max()
    passed_over = scores[(scores["rank"] < last) & ~scores.selected].row.tolist()
    assert passed_over
    assert "a filter left it out" in " ".join(explain_row(run, passed_over[0]).verdict)


def test_an_unscored_record_is_explained_without_tokens(room: Room, plain: Path, said) -> None:  # type: ignore[no-untyped-def]
    scores = pq.read_table(plain / "scores.parquet").to_pandas()
    unscored = scores[scores["rank"].isna()].row.tolist()
    assert unscored
    code, out, _ = said(plain, "--row", unscored[0])
    assert code == 0
    assert "it has no score" in out


def test_a_text_is_scored_as_the_pool_was(warm: Path, room: Room) -> None:
    run = open_run(warm)
    scores = run.scores.to_pandas()
    row = int(scores[scores["rank"] == 5].row.iloc[0])
    found = explain_text(run, list(run.record(row).turns))
    assert found.candidate.score == pytest.approx(scores.score[row], abs=1e-4)
    line = pq.read_table(warm / "token_scores.parquet").to_pylist()[row]
    assert found.candidate.view is not None
    kept = [value for value in line["similarity"] if value is not None]
    assert [value for value in found.candidate.view.similarity if value is not None] == pytest.approx(kept, abs=1e-3)


def test_a_pass_of_another_form_is_not_read(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(plain)
    row = int(run.scores.to_pandas().query("rank == 2").row.iloc[0])
    assert run.matched_tokens(row) is not None
    monkeypatch.setattr("trim_lightning.runs.reopened.SCORE_VERSION", 0)
    assert run.matched_tokens(row) is None


def test_a_pruned_scoring_pass_is_made_good_for_one_record(warm: Path, room: Room, tmp_path: Path, said) -> None:  # type: ignore[no-untyped-def]
    store = tmp_path / "store"
    shutil.copytree(room.root / "warm_store", store)
    shutil.rmtree(store / "score")
    before = open_run(warm)
    row = int(before.scores.to_pandas().query("rank == 2").row.iloc[0])
    kept, again = explain_row(before, row), explain_row(open_run(warm, store), row)
    assert "scored again" in again.notes[0]
    assert kept.candidate.view is not None
    assert again.candidate.view is not None
    pairs = zip(kept.candidate.view.similarity, again.candidate.view.similarity, strict=True)
    assert all(one is two or one == pytest.approx(two, abs=1e-3) for one, two in pairs)
    shutil.rmtree(store / "warmup")
    code, _, err = said(warm, "--row", row, "--store", store)
    assert code == 2
    assert err.count("\n") == 1
    assert "holds the warm-up of this run no more" in err


def test_the_page_of_one_record(hostile: Path, room: Room, tmp_path: Path, said) -> None:  # type: ignore[no-untyped-def]
    for name in ("script", "arabic", "control", "emoji"):
        record = next(record for record in room.hostile if record["response"] == HOSTILE[name])
        code, out, _ = said(hostile, "--id", record["id"], "--html", tmp_path / "one.html")
        assert code == 0
        assert not set(out) & {"\x00", "\x1b", "\u202e", "\x9b"}
        source = (tmp_path / "one.html").read_text(encoding="utf-8")
        page = Page(source)
        assert source.count("</script>") == 3
        assert "<script>document" not in source
        (item,) = page.data["candidates"]["only"]
        assert record["response"] in "".join(item["view"]["t"])
        assert "Row: how focused the token's own attention is." in " ".join(page.text)


@pytest.mark.parametrize(
    "fingerprint", [None, 5, [], {"attention": 5}, {"attention": {}}, {"attention": {"layers": 3, "of": 1}}]
)
def test_the_page_of_a_run_whose_manifest_is_damaged(
    hostile: Path,
    tmp_path: Path,
    said,  # type: ignore[no-untyped-def]
    fingerprint: object,
) -> None:
    shutil.copytree(hostile, tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["stages"]["fingerprint"] = fingerprint
    manifest["config"]["saliency"]["error_weight"] = "0.5"
    path.write_text(json.dumps(manifest))
    code, _, _ = said(tmp_path / "run", "--row", 0, "--html", tmp_path / "one.html")
    assert code == 0
    page = " ".join(Page((tmp_path / "one.html").read_text(encoding="utf-8")).text)
    assert "with weight 0.5: one minus the probability" in page
    assert "Saliency is from" not in page


def test_colours_only_where_they_are_wanted(plain: Path, said, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert "\x1b[48;5;" in said(plain, "--row", 0, "--color", "always")[1]
    assert "\x1b[" not in said(plain, "--row", 0, "--color", "never")[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    from trim_lightning.cli.explain import wants_colour

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colour("auto")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour("auto")


def test_methods_without_tokens_are_explained_by_their_score(room: Room, said) -> None:  # type: ignore[no-untyped-def]
    run = room.select("explain_longest", "method=longest", "selection.count=12")
    code, out, _ = said(run, "--row", 0)
    assert code == 0
    assert "ranks whole records" in out
    code, _, err = said(run, "--text", "hello")
    assert code == 2
    assert "has no fingerprints" in err


def test_turns_rank_a_record_behind_others_with_lower_scores(room: Room, said) -> None:  # type: ignore[no-untyped-def]
    run = room.select("explain_turns", "method=bm25", "method.aggregate=round_robin", "selection.count=6")
    scores = pq.read_table(run / "scores.parquet").to_pandas().dropna(subset=["rank"]).set_index("rank").sort_index()
    passed = scores[~scores.selected & (scores.score > scores.score[6])].iloc[0]
    code, out, _ = said(run, "--row", passed.row)
    assert code == 0
    assert f"{passed.score - scores.score[6]:.4f} above the last picked record" in " ".join(out.split())
    assert "Targets or groups took turns" in out


def test_groups_are_explained_by_their_best(room: Room) -> None:
    run = open_run(room.select("explain_groups", "selection.count=12", "target.group_field=subtask"))
    scores = run.scores.to_pandas()
    row = int(scores[scores["rank"] == 1].row.iloc[0])
    found = explain_row(run, row)
    best = max(("maths", "travel"), key=lambda group: scores.loc[row, f"score/{group}"])
    assert found.candidate.view is not None
    assert found.candidate.view.group == best
    assert explain_text(run, list(run.record(row).turns)).candidate.view.group == best  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "999"], "the pool has rows 0 to 59"),
        (["--id", "nobody"], "the pool has no such record"),
        (["--row", "1", "--response", "x"], "belongs to --text"),
        ([], "one of the arguments"),
        (["--row", "1", "--store", "nowhere"], "stage store is not there"),
        (["--text", ""], "no token in scope"),
    ],
)
def test_mistakes_are_one_line(plain: Path, said, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    code, _, err = said(plain, *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_changed_pool_is_noticed(room: Room, said) -> None:  # type: ignore[no-untyped-def]
    pool = room.root / "changing.jsonl"
    shutil.copy(room.root / "pool.jsonl", pool)
    run = room.select("changing", f"pool.path={pool}", "method=longest", "selection.count=12")
    pool.write_text(pool.read_text() + '{"id": "new", "prompt": "a", "response": "b"}\n')
    code, _, err = said(run, "--row", 0)
    assert code == 2
    assert "has changed since the run" in err


def test_a_manifest_that_does_not_name_the_model_is_one_line(
    room: Room,
    plain: Path,
    said,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    run = shutil.copytree(plain, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["inputs"]["model"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = said(run, "--row", 0, "--store", room.root / "store")
    assert code == 2
    assert "its files are not those that the run used" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("keys", [("fingerprint=next",), ("pooler.token_weight=error",)])
def test_a_text_is_scored_by_the_states_and_weights_of_its_run(keys: tuple[str, ...], room: Room, plain: Path) -> None:
    run = open_run(room.select(f"explain_{keys[0][-4:]}", "selection.count=12", *keys))
    scores = run.scores.to_pandas().dropna(subset=["score"])
    row = int(scores.row.iloc[3])
    found = explain_text(run, list(run.record(row).turns))
    assert found.candidate.score == pytest.approx(scores.score.loc[row], abs=2e-5)
    assert abs(pq.read_table(plain / "scores.parquet")["score"][row].as_py() - scores.score.loc[row]) > 3e-4


def test_a_sum_of_parts_is_explained_by_part_and_by_token(room: Room) -> None:
    directory = room.select("sum", "method=trim_plus", "selection.count=12")
    scores = pq.read_table(directory / "scores.parquet")
    row = int(scores["rank"].to_numpy(zero_copy_only=False).tolist().index(1.0))
    found = explain_row(open_run(directory), row)
    parts = {name: scores[f"part/{name}"][row].as_py() for name in ("trim", "alignment")}
    assert found.candidate.parts == parts
    assert found.formula.startswith(f"{sum(parts.values()):.4f} = 1 × trim {parts['trim']:.4f} + 1 × alignment")
    values = [line.alignment or 0.0 for line in found.teaching]
    assert values == sorted(values, reverse=True) != []
    text = terminal_text(found, colour=False)
    assert "tokens that teach most" in text
    page = explanation_page(found, open_run(directory))
    assert "Tokens that teach most" in page
    shown = Page((directory / "report.html").read_text())
    assert "the token's alignment" in " ".join("".join(shown.text).split())
    (item,) = [item for item in shown.data["candidates"]["top"] if item["row"] == row]
    assert item["parts"] == pytest.approx(parts, abs=1e-5)
    assert [value for value in item["view"]["a"] if value is not None]
    with pytest.raises(UserError, match="--text: method=trim_plus scores a record by its place"):
        explain_text(open_run(directory), [Turn("user", "Say hello.")])
    unasked = next(row for row in range(len(scores)) if scores["score"][row].as_py() is None)
    why = explain_row(open_run(directory), unasked).verdict[0]
    assert why == "Not picked: it has no score, for it has no response token (method=trim_plus scores responses)."


def test_a_sum_of_parts_whose_pass_was_pruned_is_scored_again(room: Room) -> None:
    directory = room.select(
        "pruned_sum", "method=trim_plus", "warmup=lora", "selection.count=12", "target.group_field=subtask",
        f"paths.store_dir={room.root / 'pruned_store'}",
    )  # fmt: skip
    scores = pq.read_table(directory / "scores.parquet")
    row = int(scores["rank"].to_numpy(zero_copy_only=False).tolist().index(1.0))
    before = explain_row(open_run(directory), row)
    shutil.rmtree(room.root / "pruned_store" / "score")
    after = explain_row(open_run(directory), row)
    assert [note for note in after.notes if "scored again" in note or "would teach" in note] == after.notes[:2]
    assert (after.formula, after.candidate.parts) == (before.formula, before.candidate.parts)
    assert after.candidate.view is not None
    assert before.candidate.view is not None
    assert after.candidate.view.group == before.candidate.view.group != ""
    assert not after.teaching
