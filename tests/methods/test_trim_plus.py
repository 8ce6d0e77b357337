"""TRIM+ against its parts by their definitions, in float64, and what it keeps of TRIM's promises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from reference.reference import Tokens
from tiny_models import write_records
from trim_lightning.engine import scoring_pass
from trim_lightning.engine.shards import read_tensors
from trim_lightning.errors import UserError
from trim_lightning.methods.trim_plus import PARTS, standardised
from trim_lightning.stages.response_parts import shares_of
from trim_lightning.stages.token_scores import ResponseParts
from trim_lightning.trim.density import WIDTH

COMMON = ("warmup=none", "saliency.num_layers=2")
SUM = ("method=trim_plus", *COMMON)
PLUS = (*SUM, "method.density_weight=1")  # all parts


@dataclass(frozen=True)
class Seen:
    """A record's response tokens: own and predicting states, error vectors, in float64."""

    own: np.ndarray
    predicting: np.ndarray
    errors: np.ndarray


def look(lm, tokens: Tokens) -> Seen:
    with torch.no_grad():
        output = lm(torch.tensor([tokens.ids]), output_hidden_states=True)
    hidden, chances = output.hidden_states[-1][0].numpy(), torch.softmax(output.logits[0], -1).numpy()
    places = [place for place, kind in enumerate(tokens.kinds) if kind == "response" and place > 0]
    errors = -chances[[place - 1 for place in places]]
    for line, place in enumerate(places):
        errors[line, tokens.ids[place]] += 1
    return Seen(hidden[places], hidden[[place - 1 for place in places]], errors)


def alignment_of(pool: Sequence[Seen], targets: Sequence[Seen]) -> np.ndarray:
    """For-Value by its definition: the mean over the tokens of ``h^T M e``."""
    direction = sum(seen.predicting.T @ seen.errors for seen in targets) / len(targets)
    return np.array([
        np.mean([state @ direction @ error for state, error in zip(seen.predicting, seen.errors, strict=True)])
        if len(seen.own) else np.nan
        for seen in pool
    ])  # fmt: skip


def density_of(pool: Sequence[Seen], targets: Sequence[Seen]) -> np.ndarray:
    """KNN-KDE by its definition, record by record."""
    centre = np.concatenate([seen.own for seen in pool]).mean(0)

    def direction(seen: Seen) -> np.ndarray:
        vector = seen.own.mean(0) - centre
        return vector / np.linalg.norm(vector)

    known = [row for row, seen in enumerate(pool) if len(seen.own)]
    vectors = {row: direction(pool[row]) for row in known}
    number = max(1, len(known) // 10)
    wanted = [direction(target) for target in targets]
    near = [sorted(known, key=lambda row, to=to: -float(vectors[row] @ to))[:number] for to in wanted]
    some = {row for rows in near for row in rows}
    crowd = {}
    for row in some:
        kernels = [max(0.0, 1 - np.sum((vectors[row] - vectors[other]) ** 2) / WIDTH**2) for other in some]
        crowd[row] = sum(sorted(kernels, reverse=True)[:number])
    found = np.array([0.0 if len(seen.own) else np.nan for seen in pool])
    for rows in near:
        whole = sum(1 / crowd[row] for row in rows)
        for row in rows:
            found[row] += 1 / crowd[row] / whole / len(targets)
    return found


@pytest.fixture(scope="module")
def lm(method_runs):
    method_runs.reference()
    return AutoModelForCausalLM.from_pretrained(method_runs.model(), dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def seen(method_runs, lm) -> tuple[list[Seen], list[Seen]]:
    return tuple([look(lm, tokens) for tokens in method_runs.tokens(part)]
                 for part in (method_runs.pool, method_runs.targets))  # fmt: skip


@pytest.fixture(scope="module")
def trim(method_runs) -> np.ndarray:
    return method_runs.run("method=trim", *COMMON).scores.score.astype(np.float64)


def standard(parts: Sequence[np.ndarray]) -> np.ndarray:
    stacked = np.stack(parts)
    known = np.isfinite(stacked).all(0)
    stacked[:, ~known] = np.nan
    return (stacked - stacked[:, known].mean(1, keepdims=True)) / stacked[:, known].std(1, keepdims=True)


def test_score_is_the_sum_of_its_standardised_parts(method_runs, seen, trim, best_first) -> None:
    result = method_runs.run(*PLUS, "selection.count=6")
    expected = standard([trim, alignment_of(*seen), np.sqrt(density_of(*seen))])
    for part, values in zip(PARTS, expected, strict=True):
        np.testing.assert_allclose(result.scores.parts[part], values, atol=2e-3, err_msg=part)
    np.testing.assert_allclose(result.scores.score, expected.sum(0), atol=4e-3)
    assert result.chosen.tolist() == best_first(result.scores.score)[:6]
    without = [row for row, own in enumerate(seen[0]) if not len(own.own)]
    assert without, "the pool has records without a response"
    assert np.isnan(result.scores.score[without]).all()
    manifest = json.loads((result.directory / "manifest.json").read_text())
    assert any("have no response token" in warning for warning in manifest["warnings"])
    assert list(manifest["stages"])[-2:] == ["density", "select"]
    assert manifest["config"]["method"] == {
        "name": "trim_plus", "use_warmup": False, "trim_weight": 1.0, "alignment_weight": 1.0, "density_weight": 1.0,
        "length_exponent": 1.0,
    }, "keys that were not given stand at their defaults"  # fmt: skip
    table = pq.read_table(result.directory / "scores.parquet")
    assert table.column_names[-3:] == [f"part/{part}" for part in PARTS]
    documented = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text()
    assert all(f"`part/{part}`" in documented for part in PARTS)
    whole = sum(table[f"part/{part}"].to_numpy() for part in PARTS)
    np.testing.assert_allclose(table["score"].to_numpy(), whole, atol=1e-5)
    assert table["mean"].null_count < len(table), "mean, max and coverage are those of TRIM's part"


def test_weights_and_saliency_are_arithmetic_on_the_pass(method_runs, seen, trim) -> None:
    plain = method_runs.run(*PLUS)
    parts = plain.scores.parts
    weighed = method_runs.run(*PLUS, "method.trim_weight=0", "method.density_weight=0.5", "method.alignment_weight=2")
    np.testing.assert_allclose(weighed.scores.score, 0.5 * parts["density"] + 2 * parts["alignment"], atol=1e-5)
    assert list(weighed.scores.parts) == ["alignment", "density"]
    assert json.loads((weighed.directory / "manifest.json").read_text())["stages"]["score"]["cached"]
    other = method_runs.run(*PLUS, "pooler=mean")
    assert json.loads((other.directory / "manifest.json").read_text())["stages"]["score"]["cached"]
    assert (other.scores.parts["trim"] != parts["trim"]).any()
    np.testing.assert_array_equal(other.scores.parts["density"], parts["density"])


def test_without_its_weight_density_is_not_there(method_runs, seen, trim, tmp_path) -> None:
    result = method_runs.run(*SUM, store=tmp_path)
    expected = standard([trim, alignment_of(*seen)])
    for part, values in zip(("trim", "alignment"), expected, strict=True):
        np.testing.assert_allclose(result.scores.parts[part], values, atol=2e-3, err_msg=part)
    np.testing.assert_allclose(result.scores.score, expected.sum(0), atol=4e-3)
    table = pq.read_table(result.directory / "scores.parquet")
    assert [name for name in table.column_names if name.startswith("part/")] == ["part/trim", "part/alignment"]
    assert "density" not in json.loads((result.directory / "manifest.json").read_text())["stages"]
    assert not (tmp_path / "density").exists()
    (shard,) = (tmp_path / "score").glob("*/similarity-*")
    assert "mean_state" not in read_tensors(shard)


@pytest.mark.parametrize("exponent", [0, 0.5])
def test_alignment_can_count_longer_responses_more(method_runs, seen, exponent: float) -> None:
    method_runs.run(*SUM)
    result = method_runs.run(*SUM, f"method.length_exponent={exponent}", "method.trim_weight=0")
    lengths = np.array([len(own.own) for own in seen[0]], dtype=np.float64)
    expected = alignment_of(*seen) * lengths ** (1 - exponent)
    np.testing.assert_allclose(result.scores.score, standard([expected])[0], atol=2e-3)
    assert json.loads((result.directory / "manifest.json").read_text())["stages"]["score"]["cached"]


@pytest.mark.parametrize("aggregate", ["max", "mean", "round_robin"])
def test_groups(method_runs, seen, aggregate: str) -> None:
    result = method_runs.run(*PLUS, "target.group_field=subtask", f"target.aggregate={aggregate}")
    own = method_runs.run("method=trim", *COMMON, "target.group_field=subtask").scores.groups
    for place, group in enumerate(("first", "second")):
        lines = [json.dumps(target) + "\n" for target in method_runs.targets[place::2]]
        (method_runs.root / f"{group}.jsonl").write_text("".join(lines))
    wholes, parts = [], []
    for place, group in enumerate(("first", "second")):
        targets = seen[1][place::2]
        density, alignment = np.sqrt(density_of(seen[0], targets)), alignment_of(seen[0], targets)
        found = standard([own[group].astype(np.float64), alignment, density])
        np.testing.assert_allclose(result.scores.groups[group], found.sum(0), atol=6e-3)
        wholes.append(found.sum(0))
        parts.append(found)
    if aggregate == "mean":
        np.testing.assert_allclose(result.scores.score, np.mean(wholes, 0), atol=6e-3)
        np.testing.assert_allclose(result.scores.parts["density"], np.mean(parts, 0)[2], atol=6e-3)
    else:
        np.testing.assert_allclose(result.scores.score, np.max(wholes, 0), atol=6e-3)
        scored = np.isfinite(result.scores.score)
        whole = sum(result.scores.parts[part][scored] for part in PARTS)
        np.testing.assert_allclose(whole, result.scores.score[scored], atol=1e-5)
        best = np.argmax([result.scores.groups[group][scored] for group in ("first", "second")], 0)
        alone = [method_runs.run("method=trim", *COMMON, f"target.path={method_runs.root}/{group}.jsonl").scores
                 for group in ("first", "second")]  # fmt: skip
        for column in ("mean", "max", "coverage"):
            expected = np.stack([getattr(scores, column)[scored] for scores in alone])[best, np.arange(scored.sum())]
            np.testing.assert_allclose(getattr(result.scores, column)[scored], expected, atol=1e-5)
    turns = aggregate == "round_robin"
    best = [int(np.nanargmax(result.scores.groups[group])) for group in ("first", "second")]
    assert (result.order[:2].tolist() == best or best[0] == best[1]) if turns else True


def test_a_pass_shared_with_trim_or_in_small_batches_says_the_same(method_runs, tmp_path, monkeypatch) -> None:
    plain = method_runs.run(*PLUS, store=tmp_path / "one")
    again = method_runs.run(*PLUS, store=tmp_path / "two")
    for name in ("scores.parquet", "coreset.jsonl"):
        assert (plain.directory / name).read_bytes() == (again.directory / name).read_bytes()
    small = method_runs.run(*PLUS, "scoring.tokens_per_batch=128", store=tmp_path / "one")
    np.testing.assert_allclose(small.scores.score, plain.scores.score, atol=2e-2)
    calls = []
    real = scoring_pass.run_scoring_pass

    def counted(*arguments, **keywords):
        calls.append(len(arguments[2]))
        return real(*arguments, **keywords)

    monkeypatch.setattr(scoring_pass, "run_scoring_pass", counted)
    from composing import compose_select
    from trim_lightning.sweep.sharing import share_passes

    files = [f"pool.path={method_runs.root}/pool.jsonl", f"target.path={method_runs.root}/targets.jsonl"]
    common = [
        "model=hf", f"model.path={method_runs.model()}", "model.dtype=float32", "max_length=96", "pool=jsonl",
        "target=jsonl", "target.num_examples=null", "trainer=cpu", "logger=none", *COMMON, *files,
        f"paths.store_dir={tmp_path / 'shared'}", f"paths.output_dir={tmp_path / 'unused'}",
    ]  # fmt: skip
    methods = (["method=trim"], ["method=trim_plus"], ["method=trim_plus", "method.density_weight=1"])
    assert share_passes([compose_select([*method, *common]) for method in methods]) == 1
    assert calls == [3]
    shared = method_runs.run(*PLUS, store=tmp_path / "shared")
    assert calls == [3], "the job finds its pass"
    assert (shared.directory / "scores.parquet").read_bytes() == (plain.directory / "scores.parquet").read_bytes()


def test_tokens_say_what_they_teach(method_runs, lm, seen) -> None:
    result = method_runs.run(*PLUS, "scoring.save_token_scores=true")
    table = pq.read_table(result.directory / "token_scores.parquet")
    direction = sum(own.predicting.T @ own.errors for own in seen[1]) / len(seen[1])
    assert table.column_names[-1] == "alignment"
    for row in (0, 5, 20):
        values = [value for value in table["alignment"][row].as_py() if value is not None]
        expected = [float(h @ direction @ e) for h, e in zip(seen[0][row].predicting, seen[0][row].errors, strict=True)]
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3)


def test_prompts_alone_are_scoped(method_runs, seen) -> None:
    result = method_runs.run(*PLUS, "scope=prompt", "scoring.save_token_scores=true")
    assert "alignment" not in pq.read_table(result.directory / "token_scores.parquet").column_names
    assert "the token's alignment" not in (result.directory / "report.html").read_text()
    whole = method_runs.run(*PLUS).scores.parts["alignment"]
    scored = np.isfinite(result.scores.score)
    assert np.corrcoef(whole[scored], result.scores.parts["alignment"][scored])[0, 1] > 0.9999


def test_a_state_that_is_no_number_is_left_out() -> None:
    states = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float16)
    states[7] = np.nan
    responses = np.full(40, 3, dtype=np.int32)
    responses[9] = 0
    parts = ResponseParts(np.arange(40), responses, np.zeros((1, 40), dtype=np.float32), states)
    passed = SimpleNamespace(response_parts=lambda: iter([parts]))
    wanted = np.concatenate([states[[3]].astype(np.float64), np.full((1, 8), np.nan)])
    found = shares_of(passed, wanted, [[0, 1], [1]], 40)
    assert np.flatnonzero(np.isnan(found[0])).tolist() == [7, 9]
    assert found[0, 3] > 0
    assert np.nansum(found[0]) == pytest.approx(1)
    assert not np.nansum(found[1]), "nobody gives anything"


def test_equal_scores_are_standardised_to_nothing() -> None:
    found = standardised(np.stack([np.full(3, 0.1), np.array([1.0, 2, 3])]))
    np.testing.assert_allclose(found, [[0, 0, 0], [-np.sqrt(1.5), 0, np.sqrt(1.5)]], atol=1e-12)
    assert np.isnan(standardised(np.full((2, 3), np.nan))).all()


def test_only_targets_with_a_response_take_part(method_runs, tmp_path, caplog) -> None:
    targets = write_records(tmp_path / "some.jsonl", 3, seed=4, edge_cases=False)
    lines = [json.dumps({**target, **({"response": ""} if place == 1 else {})}) for place, target in enumerate(targets)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n")
    result = method_runs.run(*PLUS, f"target.path={tmp_path / 'some.jsonl'}")
    assert np.isfinite(result.scores.score).any()
    assert "1 of 3 targets have no response token" in caplog.text
    (tmp_path / "none.jsonl").write_text(json.dumps({**targets[0], "response": ""}) + "\n")
    with pytest.raises(UserError, match="or use method=trim scope=prompt to select by prompts alone"):
        method_runs.run(*PLUS, f"target.path={tmp_path / 'none.jsonl'}")
    with pytest.raises(UserError, match=r"the target set has no response token .* or use method=trim"):
        method_runs.run(*PLUS, f"target.path={tmp_path / 'none.jsonl'}", "scope=prompt")
    with pytest.raises(UserError, match="group '1' of the target set has no response token"):
        method_runs.run(*PLUS, f"target.path={tmp_path / 'some.jsonl'}", "target.single_groups=true")


def test_what_does_not_go_is_refused(method_runs) -> None:
    with pytest.raises(UserError, match="nothing is left to score by"):
        method_runs.run(*SUM, "method.trim_weight=0", "method.alignment_weight=0")
    with pytest.raises(UserError, match="scoring=cascade: method=trim_plus"):
        method_runs.run(*PLUS, "scoring=cascade")
    with pytest.raises(UserError, match=r"method\.density_weight=-1"):
        method_runs.run(*PLUS, "method.density_weight=-1")
