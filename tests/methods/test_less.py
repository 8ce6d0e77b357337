"""LESS against explicit gradients: one record and one autograd call at a time, in float64, with PEFT's own loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_checkpoints import key_of, model_at, warmup_of
from safetensors import safe_open
from safetensors.numpy import load_file

from reference.reference import Tokens
from trim_lightning.engine import record_pass
from trim_lightning.engine import shards as shard_files
from trim_lightning.engine.sketch import CountSketch
from trim_lightning.errors import UserError

EPOCHS = 3
DIMENSION = 600
METHOD = (
    "method=less", f"method.num_checkpoints={EPOCHS}", f"method.projection_dim={DIMENSION}",
    "warmup.fraction=0.4", "warmup.learning_rate=0.005", "warmup.batch_size=4", "warmup.lora_rank=4",
    "scoring.tokens_per_batch=300",
)  # fmt: skip


def mean_loss(model: torch.nn.Module, record: Tokens) -> torch.Tensor | None:
    """Mean loss of a record's response tokens and of the token that ends each response; None if there are none."""
    wanted = []
    for place in range(1, len(record.ids)):
        ends = record.kinds[place] is None and record.kinds[place - 1] == "response"
        if record.kinds[place] == "response" or ends:
            wanted.append(place)
    if not wanted:
        return None
    probabilities = torch.log_softmax(model(torch.tensor([record.ids])).logits[0], dim=-1)
    return -sum(probabilities[place - 1, record.ids[place]] for place in wanted) / len(wanted)


@dataclass
class Point:
    """One checkpoint by the plain way: the model, and Adam's state under the weights' names in it."""

    model: torch.nn.Module
    weights: dict[str, torch.nn.Parameter]
    first: dict[str, torch.Tensor]
    second: dict[str, torch.Tensor]
    step: int

    @classmethod
    def load(cls, base: Path, folder: Path) -> Point:
        model = model_at(base, folder)
        weights = {name.removeprefix("base_model.model."): w for name, w in model.named_parameters() if w.requires_grad}
        with safe_open(folder / "moments.safetensors", framework="pt") as file:
            step = json.loads(file.metadata()["adam"])["step"]
            first, second = ({n: file.get_tensor(f"{k}/{n}").double() for n in weights} for k in
                             ("exp_avg", "exp_avg_sq"))  # fmt: skip
        return cls(model, weights, first, second, step)

    def gradient(self, record: Tokens) -> dict[str, torch.Tensor] | None:
        loss = mean_loss(self.model, record)
        if loss is None:
            return None
        return dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values())), strict=True))

    def adam(self, gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What torch's own Adam adds to the weights, per unit of learning rate, from this state."""
        result = {}
        for name, values in gradient.items():
            weight = torch.nn.Parameter(torch.zeros_like(values))
            optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
            state = {"step": torch.tensor(float(self.step)), "exp_avg": self.first[name].clone()}
            optimizer.state[weight] = {**state, "exp_avg_sq": self.second[name].clone()}
            weight.grad = values
            optimizer.step()
            result[name] = -weight.detach()
        return result


def flat(gradient: dict[str, torch.Tensor] | None, order: list[str]) -> np.ndarray | None:
    return None if gradient is None else torch.cat([gradient[name].flatten() for name in order]).numpy()


def cosine(one: np.ndarray, two: np.ndarray) -> float:
    return float(one @ two / np.sqrt((one @ one) * (two @ two)))


@dataclass
class Plain:
    """All of LESS in plain steps, on the checkpoints that a run has left."""

    points: list[Point]
    shares: list[float]
    pool: list[list[np.ndarray | None]]  # checkpoints, records
    targets: list[list[np.ndarray]]

    def scores(self, matrix: np.ndarray | None, groups: list[list[int]]) -> np.ndarray:
        """``[groups, records]``; the gradients themselves without a matrix."""
        result = np.full((len(groups), len(self.pool[0])), np.nan)
        for place, rows in enumerate(groups):
            for record in range(len(self.pool[0])):
                if self.pool[0][record] is None:
                    continue
                total = 0.0
                for share, pool, targets in zip(self.shares, self.pool, self.targets, strict=True):
                    project = (lambda v: v) if matrix is None else (lambda v: matrix @ v)
                    one = project(pool[record])
                    total += share * np.mean([cosine(one, project(targets[row])) for row in rows])
                result[place, record] = total
        return result


@pytest.fixture(scope="module")
def run(method_runs):
    return method_runs.run(*METHOD)


def only(store: Path, stage: str, **settings: object) -> list[Path]:
    """Entries of a stage with these settings or inputs."""
    found = []
    for path in sorted((store / stage).iterdir()):
        key = key_of(path)
        if all({**key["settings"], **key["inputs"]["scorer"]}.get(name) == value for name, value in settings.items()):
            found.append(path)
    return found


@pytest.fixture(scope="module")
def plain(method_runs, run) -> Plain:
    warmup = warmup_of(method_runs.root / "store", EPOCHS, lora_rank=4)
    points = [Point.load(method_runs.model(), warmup / f"checkpoint-{number:03d}") for number in range(1, EPOCHS + 1)]
    order = list(points[0].weights)
    pool, targets = [], []
    for point in points:
        found = [point.gradient(record) for record in method_runs.tokens(method_runs.pool)]
        pool.append([None if g is None else flat(point.adam(g), order) for g in found])
        targets.append([flat(point.gradient(record), order) for record in method_runs.tokens(method_runs.targets)])
    # 17 records are drawn, one of them without a response; 4 at a time are 4 steps an epoch. None of the 12 rises
    # (3 % of 12), and the rate falls in a line
    assert [point.step for point in points] == [4, 8, 12]
    rates = [1 - step / 12 for step in range(12)]
    means = [sum(rates[4 * epoch : 4 * epoch + 4]) / 4 for epoch in range(EPOCHS)]
    return Plain(points, [mean / sum(means) for mean in means], pool, targets)


@pytest.fixture(scope="module")
def matrix(plain: Plain) -> np.ndarray:
    """The run's projection as an explicit matrix: column j is where coordinate j goes."""
    sizes = [weight.numel() for weight in plain.points[0].weights.values()]
    sketch = CountSketch(sizes, DIMENSION, seed=0)
    columns = []
    for part, size in enumerate(sizes):
        into = torch.zeros(size, DIMENSION)
        sketch.add(part, torch.eye(size), into)
        columns.append(into.numpy().T)
    return np.concatenate(columns, axis=1).astype(np.float64)


def stored(method_runs, number: int, preconditioner: str) -> dict[int, np.ndarray]:
    """Features by row of one stored pass."""
    (path,) = only(
        method_runs.root / "store", "gradients", number=number, preconditioner=preconditioner, dimension=DIMENSION
    )[:1]
    result: dict[int, np.ndarray] = {}
    for file in path.glob("values-*.safetensors"):
        tensors = load_file(file)
        assert tensors["values"].dtype == np.float16
        result.update(zip(tensors["rows"].tolist(), tensors["values"].astype(np.float64), strict=True))
    return result


@pytest.mark.parametrize("number", range(1, EPOCHS + 1))
def test_every_feature_is_the_projected_gradient(method_runs, plain: Plain, matrix: np.ndarray, number: int) -> None:
    pool, targets = stored(method_runs, number, "adam"), stored(method_runs, number, "none")
    compared = 0
    for row, expected in enumerate(plain.pool[number - 1]):
        if expected is None:
            assert row not in pool or not pool[row].any(), "nothing to learn from, so no gradient"
            continue
        assert cosine(pool[row], matrix @ expected) > 1 - 1e-5
        assert np.linalg.norm(pool[row]) == pytest.approx(1, abs=1e-3)
        compared += 1
    assert 30 < compared < len(method_runs.pool)
    for row, expected in enumerate(plain.targets[number - 1]):
        assert cosine(targets[row], matrix @ expected) > 1 - 1e-5


def test_scores(
    method_runs, run, plain: Plain, matrix: np.ndarray, best_first: Callable[[np.ndarray], list[int]]
) -> None:
    (expected,) = plain.scores(matrix, [[0, 1, 2, 3]])
    np.testing.assert_allclose(run.scores.score, expected, atol=1e-4)
    assert run.order.tolist() == best_first(run.scores.score)
    assert np.nanstd(expected) > 0.01, "scores that differ"


def test_projected_scores_follow_those_of_the_whole_gradients(method_runs, plain: Plain) -> None:
    scores = method_runs.run(*METHOD, "method.projection_dim=8192").scores.score
    (exact,) = plain.scores(None, [[0, 1, 2, 3]])
    found = ~np.isnan(exact)
    assert np.corrcoef(exact[found], scores[found])[0, 1] > 0.95
    assert np.abs(exact - scores)[found].max() < 4 / np.sqrt(8192)


def test_gradients_of_the_last_blocks_alone(method_runs) -> None:
    whole, last = (method_runs.run(*METHOD, *more).scores.score for more in ((), ("method.last_layers=1",)))
    found = ~np.isnan(whole)
    assert np.array_equal(found, ~np.isnan(last))
    assert 0.2 < np.corrcoef(whole[found], last[found])[0, 1] < 0.9999
    with pytest.raises(UserError, match=r"method\.last_layers=99: .* has only \d+ layers"):
        method_runs.run(*METHOD, "method.last_layers=99")


def test_mean_within_a_group_and_maximum_over_groups(method_runs, plain: Plain, matrix: np.ndarray) -> None:
    expected = plain.scores(matrix, [[0, 2], [1, 3]])
    result = method_runs.run(*METHOD, "target.group_field=subtask")
    for place, group in enumerate(("first", "second")):
        np.testing.assert_allclose(result.scores.groups[group], expected[place], atol=1e-4)
    np.testing.assert_allclose(result.scores.score, expected.max(0), atol=1e-4)


def test_other_targets_and_budgets_need_no_new_pass_over_the_pool(method_runs, run, monkeypatch) -> None:
    before = only(method_runs.root / "store", "gradients", preconditioner="adam")
    other = method_runs.run(*METHOD, "target.num_examples=2", "selection.count=9")
    assert only(method_runs.root / "store", "gradients", preconditioner="adam") == before
    assert other.manifest["stages"]["warmup"]["cached"]
    assert not np.array_equal(other.scores.score, run.scores.score, equal_nan=True)
    monkeypatch.setattr("trim_lightning.models.load.load_model", None)
    method_runs.run(*METHOD, "selection.count=3")


def test_costs_are_booked_where_they_belong(method_runs, run) -> None:
    stages = run.manifest["stages"]
    pool, targets = (
        sum(len(tokens.ids) for tokens in method_runs.tokens(part)) for part in (method_runs.pool, method_runs.targets)
    )
    assert stages["score"]["tokens"] == EPOCHS * pool
    assert stages["fingerprint"]["tokens"] == EPOCHS * targets
    assert stages["warmup"]["tokens"] > 0


def test_a_killed_pass_goes_on_at_its_last_shard(method_runs, run, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(record_pass.run_record_pass.__kwdefaults__, "shard_tokens", 200)
    real, written = shard_files.write_values, []

    def die(directory: Path, index: int, rows: np.ndarray, values: np.ndarray) -> None:
        if len(written) == 7:
            raise OSError("killed")
        real(directory, index, rows, values)
        written.append((directory.name, index))

    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "write_values", die)
        with pytest.raises(OSError, match="killed"):
            method_runs.run(*METHOD, store=tmp_path)

    def note(directory: Path, index: int, rows: np.ndarray, values: np.ndarray) -> None:
        real(directory, index, rows, values)
        written.append((directory.name, index))

    monkeypatch.setattr(shard_files, "write_values", note)
    resumed = method_runs.run(*METHOD, store=tmp_path)
    assert len(written) == len(set(written)), "a shard was computed twice"
    np.testing.assert_array_equal(resumed.scores.score, run.scores.score)


@pytest.mark.slow
def test_two_processes_score_as_one(method_runs, tmp_path: Path) -> None:
    cut = "warmup.tokens_per_micro_batch=300"  # as what is chosen for two processes is another, and with it dropout
    one = method_runs.run(*METHOD, cut)
    two = method_runs.run(*METHOD, cut, "trainer=ddp_cpu", store=tmp_path)
    np.testing.assert_allclose(two.scores.score, one.scores.score, atol=1e-4)  # gradients are summed in another order


@pytest.mark.slow
def test_the_size_of_a_batch_does_not_matter(method_runs, run) -> None:
    alone = method_runs.run(*METHOD, "scoring.tokens_per_batch=1")
    np.testing.assert_allclose(alone.scores.score, run.scores.score, atol=1e-4)


def test_without_a_warm_up_it_is_a_user_error(method_runs) -> None:
    with pytest.raises(UserError, match=r"method=less: needs the checkpoints of a warm-up, which warmup=none switches"):
        method_runs.run("method=less", "warmup=none")


def test_targets_without_a_response_are_a_user_error(method_runs, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"prompt": "words", "response": ""}\n')
    with pytest.raises(UserError, match="the target set has no response; give targets that have one"):
        method_runs.run(*METHOD, f"target.path={tmp_path}/empty.jsonl")


def test_a_divided_model_is_a_user_error(method_runs) -> None:
    with pytest.raises(UserError, match="trainer=fsdp: gradients of single records need whole weights"):
        method_runs.run(*METHOD, "trainer.strategy=fsdp", "method.projection_dim=17")


def test_the_projection_keeps_inner_products_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, dimension = [70, 20, 110], 32
    x, y = torch.randn(2, sum(sizes), generator=generator, dtype=torch.float64)
    found = []
    for seed in range(3000):
        sketch, into = CountSketch(sizes, dimension, seed), torch.zeros(2, dimension, dtype=torch.float64)
        for part, values in enumerate(torch.stack([x, y]).split(sizes, dim=1)):
            sketch.add(part, values.clone(), into)
        found.append(float(into[0] @ into[1]))
    dense = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)) / dimension  # variance with random signs everywhere
    assert np.mean(found) == pytest.approx(float(x @ y), abs=4 * float(dense / 3000) ** 0.5)
    assert np.var(found) < 1.1 * float(dense)
