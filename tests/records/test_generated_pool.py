"""The generated pool: its families, its form, and that it is the same everywhere."""

import contextlib
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trim_lightning.errors import UserError
from trim_lightning.records import generated_pool
from trim_lightning.records.generated_pool import FAMILIES, check_families, generate, with_reasoning


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("generated") / "pool.jsonl"
    generate(path, FAMILIES, 3, 0)
    return read(path)


def test_families_are_many_known_and_sorted() -> None:
    from reasoning_gym.factory import DATASETS

    assert len(FAMILIES) >= 80
    assert list(FAMILIES) == sorted(set(FAMILIES))
    assert set(FAMILIES) <= set(DATASETS)


def test_records_are_interleaved_and_complete(pool: list[dict[str, Any]]) -> None:
    assert [record["family"] for record in pool] == list(FAMILIES) * 3
    assert [record["id"] for record in pool] == [f"{name}-{place}" for place in range(3) for name in FAMILIES]
    for record in pool:
        assert record["prompt"]
        assert record["answer"]
        assert record["response"].rstrip(".").endswith(record["answer"].rstrip("."))
    lengths = {name: [len(r["prompt"]) for r in pool if r["family"] == name] for name in FAMILIES}
    assert max(sum(values) / len(values) for values in lengths.values()) < 2500


def test_the_file_is_the_same_in_every_process(pool: list[dict[str, Any]], tmp_path: Path) -> None:
    # Other hash seed, other global random state, other time zone, and a sister family order.
    code = (
        "import sys, random; random.seed(99)\n"
        "from pathlib import Path\n"
        "from trim_lightning.records.generated_pool import FAMILIES, generate\n"
        "generate(Path(sys.argv[1]), FAMILIES[::-1], 3, 0)"
    )
    path = tmp_path / "again.jsonl"
    environment = {**os.environ, "PYTHONHASHSEED": "4321", "TZ": "Pacific/Auckland"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, env=environment, capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == ("", "")
    again = {record["id"]: record for record in read(path)}
    assert {record["id"]: record for record in pool} == again


def test_no_family_reads_the_clock(monkeypatch: pytest.MonkeyPatch, pool: list[dict[str, Any]]) -> None:
    # A family that asks for today would differ tomorrow. Its module would have bound `date` or `datetime`.
    import datetime

    class Future(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2041, 2, 28)

    class FutureTime(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime(2041, 2, 28, 1, 2, 3, tzinfo=tz)

    from reasoning_gym.factory import DATASETS, create_dataset

    replaced = {datetime.date: Future, datetime.datetime: FutureTime}
    touched = set()
    for name in FAMILIES:
        module = sys.modules[DATASETS[name][0].__module__]
        for attribute, value in list(vars(module).items()):
            if isinstance(value, type) and value in replaced:
                monkeypatch.setattr(module, attribute, replaced[value])
                touched.add(name)
    assert touched
    for name in touched:
        dataset = create_dataset(name, size=3, seed=generated_pool._family_seed(name, 0))
        again = [generated_pool._record(name, place, dataset) for place in range(3)]
        assert again == [record for record in pool if record["family"] == name]


def test_another_seed_gives_other_records(tmp_path: Path) -> None:
    names = ("family_relationships", "chain_sum", "gsm_symbolic", "syllogism")
    sets = []
    for seed in (0, 1, 2):
        path = tmp_path / f"{seed}.jsonl"
        generate(path, names, 8, seed)
        sets.append({record["prompt"] for record in read(path)})
    assert not sets[0] & sets[1]
    assert not sets[1] & sets[2]


def test_entries_score_their_answers(pool: list[dict[str, Any]]) -> None:
    from reasoning_gym.factory import get_score_answer_fn

    scored = set()
    with contextlib.redirect_stdout(io.StringIO()):
        for record in (record for record in pool if "entry" in record):
            entry = {"question": record["prompt"], "answer": record["answer"], "metadata": record["entry"]}
            assert get_score_answer_fn(record["family"])(record["answer"], entry) == 1.0, record["id"]
            scored.add(record["family"])
    assert len(scored) > 0.9 * len(FAMILIES)
    # The metadata of this family does not survive JSON, and no entry is better than a wrong one.
    assert "rearc" not in scored


def test_generating_is_quiet_and_leaves_random_states_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    random.seed(5)
    np.random.seed(5)
    expected = (random.random(), np.random.rand())
    random.seed(5)
    np.random.seed(5)
    generate(tmp_path / "pool.jsonl", ("bf", "pool_matrix"), 4, 0)
    assert (random.random(), np.random.rand()) == expected
    assert capfd.readouterr() == ("", "")


def test_reasoning_comes_before_the_answer(pool: list[dict[str, Any]]) -> None:
    for record in (record for record in pool if record["family"] == "gsm_symbolic"):
        body, _, last = record["response"].rpartition("\n")
        assert body
        assert last == f"The answer is {record['answer']}."
        assert "####" not in record["response"]


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        (None, "4"),
        ("", "4"),
        ("2+2=4", "2+2=4\nThe answer is 4."),
        ("2+2=4\n#### 4", "2+2=4\nThe answer is 4."),
        ("2+2=4\nThe answer is 4.", "2+2=4\nThe answer is 4."),
        ("2+2=4\nThe answer is 4.\n#### 4\n", "2+2=4\nThe answer is 4."),
        ("#### 4", "The answer is 4."),
    ],
)
def test_the_conclusion_is_there_once(reasoning: str | None, expected: str) -> None:
    assert with_reasoning(reasoning, "4") == expected


def test_unknown_families_get_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"pool\.families: there is no family chain_sums; did you mean chain_sum\?"):
        check_families(["gcd", "chain_sums"], "pool")
    with pytest.raises(UserError, match=r"pool\.families is empty"):
        check_families([], "pool")
    assert check_families(None, "pool") == FAMILIES
    assert check_families(["gcd", "lcm", "gcd"], "pool") == ("gcd", "lcm")


def test_the_key_follows_every_argument() -> None:
    keys = [
        generated_pool.key(("gcd",), 2, 0),
        generated_pool.key(("lcm",), 2, 0),
        generated_pool.key(("gcd",), 3, 0),
        generated_pool.key(("gcd",), 2, 1),
    ]
    digests = {hashlib.sha256(json.dumps(key).encode()).hexdigest() for key in keys}
    assert len(digests) == 4
    assert {"reasoning_gym", "schema"} <= set(keys[0])
