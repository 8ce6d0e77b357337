"""The product's numbers against the slow reference, and the reference against sums done by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from reference.reference import (
    Bank,
    Match,
    Pooled,
    Reference,
    Saliency,
    Settings,
    Tokens,
    budget,
    build_bank,
    column_signal,
    match,
    pool,
    ranks,
    row_signal,
    saliency,
    scoped_places,
    unit,
    visible_keys,
    window_of_layer,
)
from running import run_select
from tiny_models import (
    ARCHITECTURES,
    CHATML,
    CHATML_WITH_SYSTEM,
    HIDDEN,
    WINDOW,
    build_tiny_model,
    build_tiny_tokenizer,
    write_records,
)

TOLERANCE = 2e-4
MAX_LENGTH = 96
POOL_SIZE = 43
BASE = {"max_length": MAX_LENGTH, "num_layers": 3, "fraction": 0.15}


@dataclass(frozen=True)
class Case:
    """One run of the product: a model and the settings that differ from the base."""

    name: str
    architecture: str = "llama"
    template: str | None = CHATML
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return Settings(**BASE | self.changes)

    def overrides(self) -> list[str]:
        """The same settings in the product's words."""
        settings = self.settings
        return [
            f"max_length={settings.max_length}",
            f"scope={settings.scope}",
            f"saliency.num_layers={settings.num_layers}",
            f"saliency.row_weight={settings.row_weight}",
            f"saliency.column_weight={settings.column_weight}",
            f"saliency.normalize={settings.normalize}",
            f"fingerprint.token_class={settings.token_class}",
            f"fallback.mode={settings.fallback_mode}",
            f"fallback.penalty={settings.penalty}",
            f"fallback.nearest={settings.nearest}",
            f"pooler={settings.pooler}",
            f"selection.fraction={settings.fraction}",
        ]


CASES = [
    *(Case(architecture, architecture) for architecture in ARCHITECTURES),
    Case("no_template", template=None),
    Case("template_adds_system", template=CHATML_WITH_SYSTEM),
    Case("scope_response", changes={"scope": "response"}),
    Case("scope_prompt", changes={"scope": "prompt"}),
    Case("two_layers", changes={"num_layers": 2}),
    Case("unscaled", changes={"normalize": "none"}),
    Case("other_weights", changes={"row_weight": 0.9, "column_weight": 0.3}),
    Case("next_token", changes={"token_class": "next"}),
    Case("next_token_first_counts", template=None, changes={"token_class": "next", "nearest": "hidden"}),
    Case("discount", changes={"fallback_mode": "discount", "penalty": 0.7}),
    Case("zero", changes={"fallback_mode": "zero"}),
    Case("nearest_hidden", changes={"nearest": "hidden"}),
    Case("pooler_max", changes={"pooler": "max"}),
    Case("pooler_mean_max", changes={"pooler": "mean_max"}),
]


@dataclass(frozen=True)
class Expected:
    """What the reference says about a case, in pool or target order."""

    targets: list[dict[str, str]]
    target_tokens: list[Tokens]
    saliencies: list[Saliency]
    bank: Bank
    pool_tokens: list[Tokens]
    matches: list[Match]
    pooled: list[Pooled]


@dataclass(frozen=True)
class Outcome:
    """A case, what the reference expects, and where the product wrote its files."""

    case: Case
    expected: Expected
    output: Path


class ReferenceFiles:
    """Models, record files and one stage store, shared by all cases of this module.

    Sharing the store is on purpose: a setting that is missing in a stage's key shows as a wrong number.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pool_file, self.target_file = root / "pool.jsonl", root / "targets.jsonl"
        self.pool = write_records(self.pool_file, POOL_SIZE, seed=1)
        self.targets = write_records(
            self.target_file,
            4,
            seed=2,
            topics=("arithmetic", "cooking"),
            prompt_words=(3, 10),
            response_words=(2, 60),
            edge_cases=False,
            groups=("first", "second"),
        )
        self._references: dict[tuple[str, str | None], tuple[Path, Reference]] = {}

    def model(self, architecture: str, template: str | None) -> tuple[Path, Reference]:
        """The model folder and the reference that has read it."""
        key = (architecture, template)
        if key not in self._references:
            folder = build_tiny_model(
                architecture, self.root / f"model_{len(self._references)}", seed=3, chat_template=template
            )
            self._references[key] = (folder, Reference(folder))
        return self._references[key]

    def expect(self, case: Case) -> Expected:
        """Run the reference."""
        settings = case.settings
        _, reference = self.model(case.architecture, case.template)
        bank = reference.bank(self.targets, settings)
        matches = [reference.match(record, bank, settings) for record in self.pool]
        return Expected(
            targets=self.targets,
            target_tokens=[reference.tokens(record, settings) for record in self.targets],
            saliencies=[reference.saliency(record, settings) for record in self.targets],
            bank=bank,
            pool_tokens=[reference.tokens(record, settings) for record in self.pool],
            matches=matches,
            pooled=[pool(matched, settings) for matched in matches],
        )

    def run(self, case: Case, *more: str) -> Path:
        """Run the product; its output directory."""
        folder, _ = self.model(case.architecture, case.template)
        return run_select(
            "model=hf",
            f"model.path={folder}",
            "model.dtype=float32",
            "pool=jsonl",
            f"pool.path={self.pool_file}",
            "target=jsonl",
            f"target.path={self.target_file}",
            "target.num_examples=null",
            "warmup=none",
            "trainer=cpu",
            "logger=none",
            "scoring.save_token_scores=true",
            *case.overrides(),
            *more,
            output_dir=self.root / "runs" / "_".join([case.name, *(word.split("=")[-1] for word in more)]),
            store_dir=self.root / "store",
        )


@pytest.fixture(scope="module")
def reference_files(tmp_path_factory: pytest.TempPathFactory) -> ReferenceFiles:
    return ReferenceFiles(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def outcome(request: pytest.FixtureRequest, reference_files: ReferenceFiles) -> Outcome:
    return Outcome(request.param, reference_files.expect(request.param), reference_files.run(request.param))


def column(table: Any, name: str) -> list[Any]:
    """A column as Python values."""
    return table.column(name).to_pylist()


def floats(values: Sequence[float | None]) -> np.ndarray:
    """Numbers as an array, None as NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def assert_close(actual: Any, expected: Any, what: str) -> None:
    """Equal within the tolerance, nulls in the same places."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE, equal_nan=True, err_msg=what)


def scope_of(tokens: Tokens, settings: Settings) -> list[bool]:
    places = set(scoped_places(tokens, settings.scope))
    return [i in places for i in range(len(tokens.ids))]


# ------------------------------------------------------------------------- the product and the reference


def test_scores(outcome: Outcome) -> None:
    table = pq.read_table(outcome.output / "scores.parquet")
    pooled = outcome.expected.pooled
    assert column(table, "row") == list(range(POOL_SIZE))
    assert column(table, "id") == [f"r{row}" for row in range(POOL_SIZE)]
    assert column(table, "num_scored") == [scores.num_scored for scores in pooled]
    for name in ("score", "mean", "max", "coverage"):
        expected = floats([getattr(scores, name) for scores in pooled])
        assert_close(floats(column(table, name)), expected, name)
    assert column(table, "score")[2] is None


def test_ranks_and_selection(outcome: Outcome) -> None:
    table = pq.read_table(outcome.output / "scores.parquet")
    got, selected, scores = column(table, "rank"), column(table, "selected"), column(table, "score")
    assert got == ranks(scores), "ranks must follow the written scores, ties by pool order"
    size = budget(outcome.case.settings.fraction, POOL_SIZE)
    assert size == 6
    assert selected == [rank is not None and rank <= size for rank in got]
    expected = [scores.score for scores in outcome.expected.pooled]
    for row, score in enumerate(expected):
        if score is None:
            assert got[row] is None
            continue
        others = [other for place, other in enumerate(expected) if other is not None and place != row]
        best = 1 + sum(other > score + 2 * TOLERANCE for other in others)
        worst = 1 + sum(other >= score - 2 * TOLERANCE for other in others)
        assert best <= got[row] <= worst, f"row {row}"


def test_coreset_lists_the_selected_lines_best_first(outcome: Outcome, reference_files: ReferenceFiles) -> None:
    table = pq.read_table(outcome.output / "scores.parquet")
    order = sorted((rank, row) for row, rank in enumerate(column(table, "rank")) if rank is not None)
    lines = reference_files.pool_file.read_bytes().splitlines(keepends=True)
    chosen = [lines[row] for _, row in order[: budget(outcome.case.settings.fraction, POOL_SIZE)]]
    assert (outcome.output / "coreset.jsonl").read_bytes() == b"".join(chosen)


def test_fingerprints(outcome: Outcome) -> None:
    stored, bank = load_file(outcome.output / "fingerprints.safetensors"), outcome.expected.bank
    ids = [int(token_id) for token_id in stored["token_ids"]]
    assert sorted(ids) == sorted(bank.vectors)
    assert stored["vectors"].dtype == np.float32
    assert [int(count) for count in stored["count"]] == [bank.count[token_id] for token_id in ids]
    assert_close(stored["vectors"], np.stack([bank.vectors[token_id] for token_id in ids]), "vectors")
    assert_close(stored["idf"], [bank.idf[token_id] for token_id in ids], "idf")
    assert_close(stored["mass"], [bank.mass[token_id] for token_id in ids], "mass")


def test_target_tokens(outcome: Outcome) -> None:
    rows = {line["id"]: line for line in pq.read_table(outcome.output / "target_tokens.parquet").to_pylist()}
    expected = outcome.expected
    assert sorted(rows) == sorted(record["id"] for record in expected.targets)
    for record, tokens, signals in zip(expected.targets, expected.target_tokens, expected.saliencies, strict=True):
        line = rows[record["id"]]
        assert line["token_ids"] == tokens.ids
        assert line["scope"] == scope_of(tokens, outcome.case.settings)
        assert_close(floats(line["row_saliency"]), signals.row, f"{record['id']} row")
        assert_close(floats(line["column_saliency"]), signals.column, f"{record['id']} column")
        assert_close(floats(line["saliency"]), signals.alpha, f"{record['id']} alpha")


def test_token_scores(outcome: Outcome) -> None:
    lines = pq.read_table(outcome.output / "token_scores.parquet").to_pylist()
    assert [line["row"] for line in lines] == list(range(POOL_SIZE))
    for line, tokens, matched in zip(lines, outcome.expected.pool_tokens, outcome.expected.matches, strict=True):
        scope = scope_of(tokens, outcome.case.settings)
        assert line["token_ids"] == tokens.ids, line["id"]
        assert line["scope"] == scope, line["id"]
        assert_close(floats(line["similarity"]), matched.similarity, line["id"])
        inside = [bool(direct) for direct, scoped in zip(line["direct"], scope, strict=True) if scoped]
        assert inside == matched.direct[scope].tolist(), line["id"]


@pytest.mark.parametrize(("aggregate", "combine"), [("max", max), ("mean", lambda pair: sum(pair) / 2)])
def test_target_groups(
    reference_files: ReferenceFiles, aggregate: str, combine: Callable[[tuple[float, float]], float]
) -> None:
    case = Case("groups")
    _, reference = reference_files.model(case.architecture, case.template)
    output = reference_files.run(case, "target.group_field=subtask", f"target.aggregate={aggregate}")
    table = pq.read_table(output / "scores.parquet")
    by_group: dict[str, list[float | None]] = {}
    for group in ("first", "second"):
        members = [record for record in reference_files.targets if record["subtask"] == group]
        bank = reference.bank(members, case.settings)
        matches = [reference.match(record, bank, case.settings) for record in reference_files.pool]
        by_group[group] = [pool(matched, case.settings).score for matched in matches]
        assert_close(floats(column(table, f"score/{group}")), floats(by_group[group]), group)
    pairs = zip(by_group["first"], by_group["second"], strict=True)
    combined = [None if a is None or b is None else combine((a, b)) for a, b in pairs]
    assert_close(floats(column(table, "score")), floats(combined), aggregate)


# ------------------------------------------------------------------------- the inputs are worth comparing


def test_inputs_exercise_the_method(reference_files: ReferenceFiles) -> None:
    expected = reference_files.expect(Case("base"))
    direct = np.concatenate([matched.direct[~np.isnan(matched.similarity)] for matched in expected.matches])
    assert 0.05 < 1 - direct.mean() < 0.6, "both matches and fallbacks are needed"
    assert any(tokens.truncated for tokens in expected.target_tokens)
    assert sum(tokens.truncated for tokens in expected.pool_tokens) >= 2
    assert len({round(idf, 6) for idf in expected.bank.idf.values()}) >= 3
    assert [row for row, scores in enumerate(expected.pooled) if scores.score is None] == [2]
    response = reference_files.expect(Case("response", changes={"scope": "response"}))
    assert [row for row, scores in enumerate(response.pooled) if scores.score is None] == [1, 2, 5]


@pytest.mark.slow
def test_variants_change_the_scores(reference_files: ReferenceFiles) -> None:
    base = floats([scores.score for scores in reference_files.expect(Case("base")).pooled])
    for case in CASES:
        if case.architecture == "llama" and case.changes:
            other = floats([scores.score for scores in reference_files.expect(case).pooled])
            assert np.nanmax(np.abs(other - base)) > 10 * TOLERANCE, case.name


# ------------------------------------------------------------------------------ the reference, by hand


def causal(rows: list[list[float]]) -> np.ndarray:
    """Ragged rows as `[1, seq, seq]`, zeros where nothing is visible."""
    square = np.zeros((1, len(rows), len(rows)))
    for i, row in enumerate(rows):
        square[0, i, i + 1 - len(row) : i + 1] = row
    return square


@pytest.mark.parametrize("window", [None, 3])
def test_uniform_attention_has_no_row_signal(window: int | None) -> None:
    uniform = causal([[1 / len(visible_keys(i, window))] * len(visible_keys(i, window)) for i in range(7)])
    np.testing.assert_allclose(row_signal([uniform], [window]), 0, atol=1e-12)


def test_column_signal_of_uniform_attention_is_the_mean_share() -> None:
    uniform = causal([[1 / (i + 1)] * (i + 1) for i in range(4)])
    full = [(1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, (1 / 2 + 1 / 3 + 1 / 4) / 3, (1 / 3 + 1 / 4) / 2, 1 / 4]
    np.testing.assert_allclose(column_signal([uniform], [None]), full)
    windowed = causal([[1], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(column_signal([windowed], [2]), [0.75, 0.5, 0.5, 0.5])


def test_attention_to_one_key_has_row_signal_one_but_for_the_first_query() -> None:
    assert row_signal([np.eye(4)[None]], [None]).tolist() == [0, 1, 1, 1]


def test_signals_and_alpha_of_three_tokens() -> None:
    attention = causal([[1.0], [0.25, 0.75], [0.5, 0.25, 0.25]])
    half = 1 - (0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / math.log(2)
    third = 1 - (0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(3)
    np.testing.assert_allclose(row_signal([attention], [None]), [0, half, third])
    np.testing.assert_allclose(column_signal([attention], [None]), [1.75 / 3, 0.5, 0.25])
    signals = saliency([attention], [None], [0, 1, 2], Settings())
    np.testing.assert_allclose(signals.row, [0, 1, third / half])
    np.testing.assert_allclose(signals.column, [1, 0.75, 0], atol=1e-12)
    np.testing.assert_allclose(signals.alpha, [0.5, 0.875, 0.5 * third / half])
    tail = saliency([attention], [None], [1, 2], Settings())
    np.testing.assert_allclose(tail.alpha, [np.nan, 1, 1e-6])
    alone = saliency([attention], [None], [2], Settings())
    assert alone.alpha[2] == 1


def test_layers_and_heads_are_averaged() -> None:
    one, other = causal([[1], [0.5, 0.5]]), causal([[1], [0, 1]])
    stacked = np.concatenate([one, other])
    assert row_signal([stacked, other], [None, None])[1] == pytest.approx(2 / 3)
    assert column_signal([stacked, other], [None, None])[0] == pytest.approx((0.75 + 0.5 + 0.5) / 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loops_agree_with_whole_array_formulas_on_real_attention(
    reference_files: ReferenceFiles, architecture: str
) -> None:
    _, reference = reference_files.model(architecture, CHATML)
    ids = reference.tokens(reference_files.pool[4], Settings(max_length=MAX_LENGTH)).ids
    _, attention = reference.forward(ids)
    windows = [window_of_layer(reference.model.config, layer) for layer in range(len(attention))]
    rows, columns = [], []
    age = np.arange(len(ids))[:, None] - np.arange(len(ids))[None]
    for weights, window in zip(attention, windows, strict=True):
        visible = (age >= 0) & (age < (window or len(ids)))
        entropy = -np.where(visible, weights * np.log(np.where(visible, weights, 1)), 0).sum(-1)
        size = visible.sum(-1)
        rows.append(np.where(size > 1, 1 - entropy / np.log(np.maximum(size, 2)), 0).mean(0))
        columns.append((weights.sum(-2) / visible.sum(-2)).mean(0))
    np.testing.assert_allclose(row_signal(attention, windows), np.mean(rows, 0), atol=1e-9)
    np.testing.assert_allclose(column_signal(attention, windows), np.mean(columns, 0), atol=1e-9)
    assert np.mean(rows) > 0.02, "attention is too uniform to test anything"


def test_windows_follow_the_configs(reference_files: ReferenceFiles) -> None:
    configs = {name: reference_files.model(name, CHATML)[1].model.config for name in ARCHITECTURES}
    windows = {
        name: [window_of_layer(config, layer) for layer in range(config.num_hidden_layers)]
        for name, config in configs.items()
    }
    assert windows.pop("mistral") == [WINDOW] * 4
    assert windows.pop("gemma3") == [WINDOW, WINDOW, None] * 2
    assert all(found == [None] * 4 for found in windows.values())


def test_bank_of_two_targets() -> None:
    east, north = np.array([2.0, 0.0]), np.array([0.0, 5.0])
    first, second = Tokens([7, 8, 7], ["prompt"] * 3, False), Tokens([7, 9], ["prompt", None], False)
    bank = build_bank(
        [
            (first, np.stack([east, north, north]), np.array([0.6, 1, 0.8])),
            (second, np.stack([east, north]), np.array([0.2, np.nan])),
        ]
    )
    assert sorted(bank.vectors) == [7, 8]
    np.testing.assert_allclose(bank.vectors[7], [math.sqrt(0.5), math.sqrt(0.5)])
    np.testing.assert_allclose(bank.vectors[8], [0, 1])
    assert bank.count == {7: 3, 8: 1}
    assert bank.mass == {7: pytest.approx(1.6), 8: pytest.approx(1)}
    assert bank.idf == {7: pytest.approx(1), 8: pytest.approx(math.log(3 / 2) + 1)}


@pytest.mark.parametrize(
    ("changes", "similarity"),
    [
        ({}, 0.9 * 0.6),
        ({"fallback_mode": "discount"}, 0.1 * 0.6),
        ({"fallback_mode": "zero"}, 0.0),
        ({"nearest": "hidden"}, 0.9 * 0.8),
    ],
)
def test_match_of_one_known_and_one_unknown_class(changes: dict[str, Any], similarity: float) -> None:
    bank = Bank(vectors={1: np.array([1.0, 0.0]), 2: np.array([0.0, 1.0])})
    embeddings = np.stack([unit(np.array(row)) for row in ([1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [9.0, 9.0])])
    tokens = Tokens([3, 2, 0], [None, "prompt", "response"], False)
    hidden = np.array([[1.0, 1.0], [3.0, 3.0], [0.6, 0.8]])
    matched = match(tokens, hidden, bank, embeddings, Settings(**changes))
    np.testing.assert_allclose(matched.similarity, [np.nan, math.sqrt(0.5), similarity], atol=1e-12)
    assert matched.direct.tolist() == [False, True, False]


def test_pooling_by_hand() -> None:
    matched = Match(np.array([np.nan, 0.2, 0.8, -0.4]), np.array([False, True, False, False]))
    pooled = pool(matched, Settings())
    assert (pooled.mean, pooled.max, pooled.coverage) == pytest.approx((0.2, 0.8, 1 / 3))
    assert pooled.score == pytest.approx(0.5 * 0.2 + 0.5 * 0.8 + 0.05 / 3)
    assert pooled.num_scored == 3
    assert pool(matched, Settings(pooler="max")).score == pytest.approx(0.8)
    empty = pool(Match(np.array([np.nan]), np.array([False])), Settings())
    assert empty == Pooled(None, None, None, None, 0)


def test_ranks_and_budget_by_hand() -> None:
    assert ranks([0.5, None, 0.9, 0.5, -1]) == [2, None, 1, 3, 4]
    assert [budget(0.05, 10), budget(0.29, 100), budget(1, 7)] == [1, 29, 7]


# --------------------------------------------------------------------------------------- tiny models


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("template", [None, CHATML, CHATML_WITH_SYSTEM])
def test_content_tokens_are_those_of_the_text_alone(
    reference_files: ReferenceFiles, architecture: str, template: str | None
) -> None:
    folder, reference = reference_files.model(architecture, template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    compared = 0
    for record in reference_files.pool:
        if record["prompt"] != record["prompt"].strip() or record["response"] != record["response"].strip():
            continue
        tokens = reference.tokens(record, Settings())
        for kind in ("prompt", "response"):
            held = [token_id for token_id, found in zip(tokens.ids, tokens.kinds, strict=True) if found == kind]
            assert held == tokenizer(record[kind], add_special_tokens=False).input_ids, record["id"]
            compared += 1
    assert compared > 60


def test_a_token_that_straddles_template_and_text_is_content(reference_files: ReferenceFiles) -> None:
    _, reference = reference_files.model("llama", CHATML)
    tokens = reference.tokens(reference_files.pool[6], Settings())
    first = [tokens.kinds.index(kind) for kind in ("prompt", "response")]
    texts = [str(reference.tokenizer.decode([tokens.ids[place]])) for place in first]
    assert texts[0].startswith("\n "), "template newline and the text's blank are one token"
    assert texts[1].startswith("\n\n")
    assert tokens.kinds[first[0] - 1] is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_model_loads_and_is_the_real_class(reference_files: ReferenceFiles, architecture: str) -> None:
    folder, reference = reference_files.model(architecture, CHATML)
    model = AutoModelForCausalLM.from_pretrained(folder)
    classes = {"opt_projected": "OPTForCausalLM", "gemma3": "Gemma3ForCausalLM"}
    assert type(model).__name__.lower() == classes.get(architecture, f"{architecture}ForCausalLM").lower()
    assert model.config.hidden_size == HIDDEN
    assert (folder / "model.safetensors").is_file()
    text = "Any text: 漢字 🙂\t\u0000 ~"
    assert reference.tokenizer.decode(reference.tokenizer(text).input_ids) == text
    if architecture != "qwen2":  # for Qwen2, AutoTokenizer puts its own splitting rule in place of the saved one
        assert reference.tokenizer(text).input_ids == build_tiny_tokenizer()(text).input_ids


def test_tiny_model_depends_on_the_seed_only(tmp_path: Path) -> None:
    folders = [build_tiny_model("llama", tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tiny model of architecture 'bert'"):
        build_tiny_model("bert", tmp_path)


def test_records_are_reproducible_and_varied(tmp_path: Path) -> None:
    records = write_records(tmp_path / "a.jsonl", 20, seed=5)
    assert write_records(tmp_path / "b.jsonl", 20, seed=5) == records
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert len((tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")) == 21
    assert len({len(record["response"]) for record in records}) > 8
    with pytest.raises(ValueError, match="edge cases need at least 10"):
        write_records(tmp_path / "c.jsonl", 9, seed=5)
