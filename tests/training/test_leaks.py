"""What pool, targets, held-out records and the records of early stop share is said in one line, found by content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composing import compose_train
from running import run_select, run_train, unwrapped
from training.conftest import TrainingFiles, write_lines
from trim_lightning.pipeline.leaks import warn_of_shared
from trim_lightning.pipeline.measuring import measured_records
from trim_lightning.pipeline.train import Training
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import LineSource, ReadOptions, RecordFile
from trim_lightning.records.shared import questions
from trim_lightning.stages import texts as texts_module
from trim_lightning.stages.texts import rows_with_texts, text_digests
from trim_lightning.store import Store
from trim_lightning.store.ledger import Ledger

Records = list[dict[str, Any]]


def records_of(path: Path) -> Records:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def respelt(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The same record under another id, with other white space and case."""
    return {"id": name, "prompt": f"  {record['prompt'].upper()}\n", "response": record["response"].replace(" ", "\n ")}


@pytest.fixture
def selected(training_files: TrainingFiles, tmp_path: Path) -> Callable[..., Training]:
    """``selected(targets, held_out, *overrides)``: select all of the pool by length, train, evaluate."""

    def run(targets: Records, held_out: Records, *overrides: str) -> Training:
        write_lines(tmp_path / "targets.jsonl", targets)
        write_lines(tmp_path / "held_out.jsonl", held_out)
        return run_train(
            *training_files.select, "method=longest", "selection.count=5", f"target.path={tmp_path / 'targets.jsonl'}",
            f"evaluation.path={tmp_path / 'held_out.jsonl'}", *overrides,
            output_dir=tmp_path / "run", store_dir=training_files.store,
        )  # fmt: skip

    return run


def test_what_is_shared_is_a_warning_in_manifest_report_and_summary(
    selected: Callable[..., Training], training_files: TrainingFiles, tmp_path: Path
) -> None:
    pool, plain = records_of(training_files.root / "pool.jsonl"), records_of(training_files.root / "plain.jsonl")
    targets = [
        *records_of(training_files.root / "targets.jsonl"),
        respelt(pool[4], "t-pool"),
        respelt(plain[2], "t-held"),
    ]
    run = selected(targets, [*plain, respelt(pool[4], "h-pool")], "method=bm25", "selection.count=20")
    chosen = {record["id"] for record in records_of(run.directory / "selection" / "coreset.jsonl")}
    assert "r4" in chosen
    expected = [
        "1 of the 6 targets are in the pool too, 1 of whose records there are selected: t-pool (the first is row 4 of "
        "the pool)",
        "2 of the 6 targets have a prompt of the held-out records: t-pool, t-held",
        "1 of the 10 held-out records have a prompt of the coreset: h-pool",
    ]
    page = (run.directory / "selection" / "report.html").read_text(encoding="utf-8")
    for line in expected:
        assert run.manifest["warnings"].count(line) == 1
        assert run.manifest["selection"]["warnings"].count(line) == 1
        assert f"- {line}" in unwrapped(run.summary)
        assert line in page


def test_what_is_not_shared_is_no_warning(selected: Callable[..., Training], training_files: TrainingFiles) -> None:
    run = selected(
        records_of(training_files.root / "targets.jsonl"),
        records_of(training_files.root / "plain.jsonl"),
        "method=bm25",
    )
    assert not any("prompt of" in line or "in the pool too" in line for line in run.manifest["warnings"])


def test_targets_of_the_pool_are_meant_to_be_in_it(training_files: TrainingFiles, tmp_path: Path) -> None:
    def warned(*overrides: str) -> bool:
        arguments = [*training_files.select, "method=bm25", *overrides]
        run = run_select(
            *(word for word in arguments if not word.startswith("train.")),
            output_dir=tmp_path,
            store_dir=training_files.store,
        )
        return "in the pool too" in " ".join(json.loads((run / "manifest.json").read_text())["warnings"])

    assert not warned("target=from_pool", "target.path=null", "target.num_examples=5")
    assert not warned("target.noise=0.5")
    assert warned("target.path=" + str(training_files.root / "pool.jsonl"))


def test_a_large_pool_is_read_once(
    training_files: TrainingFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_pool() -> RecordFile:
        source = LineSource(training_files.root / "pool.jsonl", label="pool", name="pool", what="pool")
        return index(source, ReadOptions())

    store = Store(tmp_path / "store")
    first = text_digests(store, open_pool())
    monkeypatch.setattr(texts_module, "text_of", lambda turns: pytest.fail("read again"))
    assert (text_digests(store, open_pool()) == first).all()
    assert len(first) == 40
    assert first.nbytes == 8 * 40


def test_rows_with_a_text(training_files: TrainingFiles, tmp_path: Path) -> None:
    write_lines(tmp_path / "pool.jsonl", [{"prompt": text, "response": ""} for text in ("A  b", "", "c", "a B", "")])
    source = LineSource(tmp_path / "pool.jsonl", label="pool", name="pool", what="pool")
    digests = text_digests(Store(tmp_path / "store"), index(source, ReadOptions()))
    assert rows_with_texts(digests, ["a b", "", "d"]) == {"a b": [0, 3]}
    assert rows_with_texts(digests, []) == {}


def test_a_stop_on_the_reported_records_is_said(
    trained: Callable[..., Training], training_files: TrainingFiles
) -> None:
    run = trained(training_files.held_out("plain"), "train.early_stop=1", "train.epochs=2")
    (line,) = [line for line in run.manifest["warnings"] if "early_stop" in line]
    assert line == (
        "train.early_stop=1 watches the 9 held-out records that are reported: the epoch that is kept was chosen on "
        "them, which flatters it; give train.early_stop_path=FILE"
    )
    assert f"- {line}" in unwrapped(run.summary)


def test_early_stop_watches_a_set_of_its_own(
    trained: Callable[..., Training], training_files: TrainingFiles, tmp_path: Path
) -> None:
    numbers = records_of(training_files.root / "coreset.jsonl")
    own = [{"prompt": f"count to {n}", "response": "one two three four five"} for n in range(3)]
    write_lines(tmp_path / "own.jsonl", own)
    stop = ("train.early_stop=1", "train.epochs=2", f"train.early_stop_path={tmp_path / 'own.jsonl'}")
    run = trained(training_files.held_out("plain"), *stop)
    assert not any("early_stop" in line for line in run.manifest["warnings"])
    assert run.manifest["inputs"]["early_stop"]["rows"] == 3
    other = trained(training_files.held_out("numbers"), *stop, name="other")
    assert other.manifest["stages"]["finetune"]["cached"], "what is reported does not touch the training any more"
    alone = trained(*stop, name="alone")
    assert alone.manifest["stages"]["finetune"]["cached"], "nor need anything be reported"
    plain = records_of(training_files.root / "plain.jsonl")
    write_lines(tmp_path / "own.jsonl", [*own, respelt(plain[0], "p"), respelt(numbers[1], "n")])
    leaky = trained(training_files.held_out("plain"), *stop, name="leaky")
    assert not leaky.manifest["stages"]["finetune"]["cached"]
    told = [line.partition(".jsonl ")[2] for line in leaky.manifest["warnings"] if "early_stop" in line]
    assert told == ["have a prompt of the held-out records: p", "have a prompt of the coreset: n"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.early_stop_path={own}"], "there is no early stop that watches it; give train.early_stop too"),
        (["train.early_stop=1", "train.early_stop_path={own}.not"], "error: train.early_stop_path="),
        (["train.early_stop=1", "train.early_stop_path={own}"], "has no response token to watch"),
        (["train.early_stop=1"], "train.early_stop needs held-out records; give train.early_stop_path=FILE"),
    ],
)
def test_mistakes(
    overrides: list[str], line: str, command: Callable[..., Any], training_files: TrainingFiles, tmp_path: Path
) -> None:
    write_lines(tmp_path / "own.jsonl", [{"prompt": "count", "response": ""}])
    words = [word.format(own=tmp_path / "own.jsonl") for word in overrides]
    outcome = command(*training_files.train, *words, f"paths.store_dir={training_files.store}")
    assert outcome.code == 2
    assert line in outcome.last


def test_the_test_records_of_local_tasks_measure_too(training_files: TrainingFiles, tmp_path: Path) -> None:
    pool = records_of(training_files.root / "pool.jsonl")
    write_lines(tmp_path / "svamp.test.jsonl", [respelt(pool[4], "s0"), {"prompt": "add", "response": "four"}])
    write_lines(tmp_path / "tydiqa_goldp.test.jsonl", [{"context": "c", "question": "q", "answers": ["a"]}])
    names = ["trim_svamp", "trim_tydiqa_goldp", "trim_gsm8k", "other"]
    settings = compose_train(
        [f"evaluation.tasks=[{','.join(names)}]", f"evaluation.data_dir={tmp_path}", f"paths.output_dir={tmp_path}"]
    )
    measured = measured_records(settings, None)
    assert list(measured) == ["test records of trim_svamp"]
    ledger = Ledger()
    for what, records in measured.items():
        source = LineSource(training_files.root / "pool.jsonl", label="pool", name="pool", what="pool")
        warn_of_shared(records, what, questions(index(source, ReadOptions())), "the coreset", ledger)
    assert ledger.warnings == ["1 of the 2 test records of trim_svamp have a prompt of the coreset: s0"]
