"""What the value instrument is made of: groups of pool records, and tasks with their targets and held-out records.

Everything is drawn by fixed seeds from the shared data, so that the stored gains belong to these groups for ever.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECORDS = 4_000
RESPONSE_TOKENS = 2_500  # of a group
MOST_TOKENS = 20_000  # of a group, prompts and all: what a training costs goes with these
LONGEST = 600  # tokens of a record that may be in a group
CLUSTERS = 24
MIXTURES = 34
TARGETS, HELD_OUT = 10, 40
TUNING, REPORTING = ("gsm8k", "commonsense_qa"), ("svamp", "bbh", "mmlu")
TASKS = (*TUNING, *REPORTING)


@dataclass(frozen=True)
class Group:
    """Some records of the pool that are trained on together.

    Attributes:
        name: ``cluster-03-1`` or ``mixture-07``.
        kind: ``cluster`` (records of like words) or ``mixture`` (any records).
        rows: Places in the instrument's pool, ascending.
        response_tokens: Of all of them.
        tokens: Of all of them, prompts and template included.
    """

    name: str
    kind: str
    rows: tuple[int, ...]
    response_tokens: int
    tokens: int


def data_folder() -> Path:
    """The shared data.

    Raises:
        SystemExit: if ``TRIM_DATA_DIR`` does not name them.
    """
    folder = os.environ.get("TRIM_DATA_DIR")
    if not folder:
        raise SystemExit("error: TRIM_DATA_DIR is not set; it names the folder with pool.jsonl.gz and the targets")
    return Path(folder)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, packed or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def pool_records() -> list[dict[str, Any]]:
    """4,000 records of the shared pool, in its order."""
    lines = read_lines(data_folder() / "pool.jsonl.gz")
    rows = np.sort(np.random.default_rng(20).choice(len(lines), RECORDS, replace=False))
    return [lines[row] for row in rows]


def free_text(record: dict[str, Any]) -> dict[str, Any]:
    """A target or held-out record whose answer is text: of a question with options, the option and not its letter."""
    answer = str(record["answer"])
    choices = record.get("choices")
    if choices and re.fullmatch("[A-Z]", answer):
        return {"prompt": record["prompt"], "response": choices[ord(answer) - ord("A")]}
    return {"prompt": record["prompt"], "response": record["response"]}


def task_records(task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ten targets and forty held-out records of a task.

    BIG-bench Hard has worked answers in its training file alone, so both come from there, one after the other.
    """
    generator = np.random.default_rng([20, TASKS.index(task)])
    train = [free_text(record) for record in read_lines(data_folder() / f"{task}.train.jsonl")]
    order = generator.permutation(len(train))
    targets = [train[row] for row in order[:TARGETS]]
    if task == "bbh":
        return targets, [train[row] for row in order[TARGETS : TARGETS + HELD_OUT]]
    test = [free_text(record) for record in read_lines(data_folder() / f"{task}.test.jsonl")]
    return targets, [test[row] for row in generator.permutation(len(test))[:HELD_OUT]]


def make_groups(
    texts: Sequence[str], response_tokens: NDArray[np.int64], tokens: NDArray[np.int64], seed: int = 20
) -> list[Group]:
    """Cut the pool into groups of equal response tokens: two thirds of like records, one third of any.

    Likeness is by k-means over TF-IDF vectors of the texts, so that no method's own features are favoured. A cluster
    gives as many groups as its records fill; one whose responses are so short that a group would need more than
    `MOST_TOKENS` gives none, and its records are in the mixtures alone.

    Args:
        texts: ``[records]`` prompt and response of each.
        response_tokens: ``[records]``.
        tokens: ``[records]``, prompt and template included.
        seed: Of clusters and draws.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    words = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english").fit_transform(texts)
    vectors = normalize(TruncatedSVD(100, random_state=seed).fit_transform(words))
    labels = KMeans(CLUSTERS, n_init=4, random_state=seed).fit_predict(vectors)
    generator = np.random.default_rng(seed)
    usable = (tokens <= LONGEST) & (response_tokens > 0)
    groups: list[Group] = []
    for label in range(CLUSTERS):
        members = generator.permutation(np.flatnonzero(usable & (labels == label)))
        filled = fill(members, response_tokens, tokens)
        groups += [made(f"cluster-{label:02d}-{place}", "cluster", rows, response_tokens, tokens)
                   for place, rows in enumerate(filled)]  # fmt: skip
    for number in range(MIXTURES):
        rows = fill(generator.permutation(np.flatnonzero(usable)), response_tokens, tokens)[0]
        groups.append(made(f"mixture-{number:02d}", "mixture", rows, response_tokens, tokens))
    return groups


def fill(
    members: NDArray[np.int64], response_tokens: NDArray[np.int64], tokens: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Cut some rows, in their order, into groups that each just reach the response tokens.

    A rest of at least a third of a group is filled up from the beginning of the order; a smaller one is left out.
    """
    total = int(response_tokens[members].sum())
    if total < RESPONSE_TOKENS:
        return []
    number = (total + 2 * RESPONSE_TOKENS // 3) // RESPONSE_TOKENS
    around = np.concatenate([members, members])
    reached = np.concatenate([[0], np.cumsum(response_tokens[around])])
    found, start = [], 0
    for _ in range(number):
        end = int(np.searchsorted(reached, reached[start] + RESPONSE_TOKENS))
        if tokens[around[start:end]].sum() <= MOST_TOKENS:
            found.append(np.sort(around[start:end]))
        start = end
    return found


def made(
    name: str, kind: str, rows: NDArray[np.int64], response_tokens: NDArray[np.int64], tokens: NDArray[np.int64]
) -> Group:
    """A group with its counts."""
    return Group(name, kind, tuple(rows.tolist()), int(response_tokens[rows].sum()), int(tokens[rows].sum()))


def write_inputs(folder: Path) -> None:
    """Write pool, targets (all tasks in one file, with their task as the group) and held-out records as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"pool": pool_records(), "targets": []}
    for task in TASKS:
        targets, held_out = task_records(task)
        files["targets"] += [{"task": task, **record} for record in targets]
        files[f"held_out.{task}"] = held_out
    for name, records in files.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def read_groups(path: Path) -> list[Group]:
    """What `write_groups` wrote."""
    return [Group(**{**group, "rows": tuple(group["rows"])}) for group in json.loads(path.read_text())]


def write_groups(groups: Sequence[Group], path: Path) -> None:
    """One line a group."""
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(group)) for group in groups) + "\n]\n")
