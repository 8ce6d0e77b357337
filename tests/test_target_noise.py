"""``target.noise``: how many targets go, what comes in their place, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from composing import compose_select
from tiny_models import write_records
from trim_lightning.errors import UserError
from trim_lightning.pipeline.checks import check_settings
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.sources import open_records
from trim_lightning.records.targets import TargetSet, choose_targets
from trim_lightning.store import Store


@pytest.fixture(scope="module")
def noise_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    write_records(folder / "pool.jsonl", 40, seed=1)
    write_records(folder / "targets.jsonl", 20, seed=2, edge_cases=False, groups=("sums", "trips", "trips", "trips"))
    return folder


def drawn(noise_files: Path, *overrides: str) -> tuple[TargetSet, RecordFile]:
    """The target set that these overrides draw, and the pool."""
    settings = compose_select(
        [
            "model=hf", "model.path=none", "pool=jsonl", f"pool.path={noise_files}/pool.jsonl", "paths.output_dir=out",
            *([] if "target=from_pool" in overrides else ["target=jsonl", f"target.path={noise_files}/targets.jsonl"]),
            *overrides,
        ]
    )  # fmt: skip
    check_settings(settings)
    store = Store(noise_files / "store")
    pool = open_records(settings.pool, what="pool", seed=settings.seed, spool=store.spool)
    return choose_targets(settings, pool, store), pool


def ids(targets: TargetSet) -> list[str]:
    return [targets.records.id(row) for row in range(len(targets.records))]


@pytest.mark.parametrize(
    ("noise", "replaced"), [(0, 0), (0.04, 0), (0.05, 1), (0.25, 3), (0.5, 5), (0.74, 7), (0.75, 8), (1, 10)]
)
def test_the_share_is_rounded_to_the_nearest_number(noise: float, replaced: int, noise_files: Path) -> None:
    plain, _ = drawn(noise_files)
    noisy, pool = drawn(noise_files, f"target.noise={noise}")
    assert noisy.replaced == replaced
    assert len(noisy.records) == len(plain.records) == 10
    changed = [place for place, name in enumerate(ids(noisy)) if name != ids(plain)[place]]
    assert len(changed) == replaced
    rows = {f"pool:{pool.id(row)}": row for row in range(len(pool))}
    assert len({ids(noisy)[place] for place in changed}) == replaced, "no record comes in twice"
    for place in range(10):
        expected = pool.record(rows[ids(noisy)[place]]) if place in changed else plain.records.record(place)
        assert noisy.records.record(place).turns == expected.turns


def test_without_noise_the_targets_are_what_they_were(noise_files: Path) -> None:
    plain, _ = drawn(noise_files)
    zero, _ = drawn(noise_files, "target.noise=0")
    assert zero.records.identity() == plain.records.identity()
    assert zero.describe() == plain.describe()
    assert "replaced" not in zero.describe()


def test_a_larger_share_holds_the_smaller_one_and_the_content_is_the_key(noise_files: Path) -> None:
    some, more = (drawn(noise_files, f"target.noise={noise}")[0] for noise in (0.3, 0.6))
    assert {name for name in ids(some) if name.startswith("pool:")} < set(ids(more))
    assert some.records.identity() != more.records.identity()
    again, _ = drawn(noise_files, "target.noise=0.3")
    assert again.records.identity() == some.records.identity()
    same, _ = drawn(noise_files, "target.noise=0.26")  # another value of the key, the same three records
    assert same.records.identity() == some.records.identity()


def test_the_seed_draws_other_noise(noise_files: Path) -> None:
    noise = [
        {name for name in ids(drawn(noise_files, "target.noise=0.5", f"seed={seed}", "target.num_examples=null")[0])
         if name.startswith("pool:")}
        for seed in (0, 1)
    ]  # fmt: skip
    assert len(noise[0]) == len(noise[1]) == 10
    assert noise[0] != noise[1]


def test_every_group_gets_its_share(noise_files: Path) -> None:
    groups = ["target.group_field=subtask", "target.num_examples=4"]
    plain, _ = drawn(noise_files, *groups)
    noisy, _ = drawn(noise_files, *groups, "target.noise=0.5")
    assert noisy.groups == plain.groups == {"sums": [*noisy.groups["sums"]], "trips": [*noisy.groups["trips"]]}
    for members in noisy.groups.values():
        assert sum(ids(noisy)[place].startswith("pool:") for place in members) == 2


def test_targets_from_the_pool_are_not_replaced_by_themselves(noise_files: Path) -> None:
    targets, pool = drawn(noise_files, "target=from_pool", "target.num_examples=20")
    noisy, _ = drawn(noise_files, "target=from_pool", "target.num_examples=20", "target.noise=1")
    own = {f"pool:{name}" for name in ids(targets)}
    assert noisy.replaced == 20
    assert not own & set(ids(noisy))
    assert len(pool) == 40, "what is drawn stays in the pool"


@pytest.mark.parametrize("noise", ["-0.1", "1.01", "nan"])
def test_a_share_outside_0_to_1_is_refused(noise: str, noise_files: Path) -> None:
    with pytest.raises(UserError, match=r"^target\.noise="):
        drawn(noise_files, f"target.noise={noise}")


def test_too_small_a_pool_is_named(noise_files: Path) -> None:
    with pytest.raises(
        UserError, match=r"target\.noise: 30 of \d+ targets are to be replaced, the pool has only 10 other"
    ):
        drawn(noise_files, "target=from_pool", "target.num_examples=30", "target.noise=1")
