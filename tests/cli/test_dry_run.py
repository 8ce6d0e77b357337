"""`dry_run`: the plan says what would be done, does nothing of it, and knows what is done already."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from composing import compose_select, compose_train
from trim_lightning.pipeline.select import select
from trim_lightning.pipeline.train import train
from trim_lightning.store import Store
from trim_lightning.sweep.dry_run_text import plan_text
from trim_lightning.sweep.estimate import estimate
from trim_lightning.sweep.plan import Plan, plan_jobs
from trim_lightning.sweep.planning_store import NotBuilt, UnbuiltEntry
from trim_lightning.sweep.work import factor_of, training_need

from .conftest import Inputs, Outcome, Run


def lines_of(told: str) -> dict[str, list[str]]:
    """The table: stage to results, in the store, to build, passes."""
    found = {}
    for line in told.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) > 5 and cells[1].isdigit():
            found[cells[0]] = cells[1:5]
    return found


def dry(
    run: Run, inputs: Inputs, tmp_path: Path, *overrides: str, flags: tuple[str, ...] = (), code: int = 0
) -> Outcome:
    outcome = run(
        *flags, *inputs.arguments, f"paths.store_dir={tmp_path / 'store'}", "dry_run=true", *overrides,
        f"hydra.run.dir={tmp_path / 'out'}", f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )  # fmt: skip
    assert outcome.code == code, outcome.err
    return outcome


def plan_of(inputs: Inputs, store: Path, *overrides: str) -> Plan:
    paths = [f"paths.store_dir={store}", f"paths.output_dir={store}-out"]
    return plan_jobs({0: compose_select([*inputs.arguments, *paths, *overrides])})


@pytest.mark.slow
def test_a_single_run_is_planned_and_nothing_is_done(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    told = dry(run, inputs, tmp_path).out
    assert lines_of(told) == {
        "warmup": ["1", "0", "1", "1"], "fingerprint": ["1", "0", "1", "1"], "score": ["1", "0", "1", "1"],
    }  # fmt: skip
    assert re.search(r"in all about .* of memory, .* of disk in store; measured in \d+ s", told)
    stages = {path.name for path in (tmp_path / "store").iterdir()}
    assert not stages & {"warmup", "signals", "fingerprint", "score"}
    assert not list(tmp_path.rglob("scores.parquet"))
    written = json.loads((tmp_path / "out" / "plan" / "plan.json").read_text())
    assert written["stages"]["score"]["passes"] == 1
    assert written["seconds"] > written["stages"]["score"]["seconds"] > 0
    assert written["disk_bytes"] > 0
    assert written["memory_bytes"] > 1e8


@pytest.mark.slow
def test_a_sweep_is_planned_as_one(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    axes = ("warmup=none", "saliency.num_layers=1,2,99", "pooler=mean,max")
    told = dry(run, inputs, tmp_path, *axes, flags=("-m",), code=2)
    assert "plan of 6 jobs, without the 2 that cannot run" in told.out
    assert lines_of(told.out) == {"fingerprint": ["1", "0", "1", "1"], "score": ["2", "0", "2", "1"]}
    assert (
        "cannot run: #4 (saliency.num_layers=99 pooler=mean), #5 (saliency.num_layers=99 pooler=max): saliency"
        in told.out
    )
    assert told.err.splitlines()[-1].startswith("error: saliency.num_layers=99")
    assert set(json.loads((tmp_path / "sweep" / "plan" / "plan.json").read_text())["problems"]) == {"4", "5"}
    assert not list(tmp_path.rglob("scores.parquet"))


def test_a_model_whose_last_states_are_narrow_is_planned(inputs: Inputs, tmp_path: Path, tiny_folder) -> None:
    """OPT may project its last hidden states to the width of its embeddings."""
    plan = plan_of(inputs, tmp_path / "store", "warmup=none", f"model.path={tiny_folder('opt_projected')}")
    assert [cost.stage for cost in plan.missing] == ["fingerprint", "score"]
    measured = estimate(plan)
    assert not measured.failed
    assert all(measured.times.get(cost, 0) > 0 for cost in plan.missing)


@pytest.mark.parametrize("flags", [(), ("-m",)])
def test_a_plan_names_no_key_and_no_path(run: Run, inputs: Inputs, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """What cannot run is told with the words of the command line; a sweep's Hydra keeps those in a file of its own."""
    axis = ("seed=1,2",) if flags else ()
    missing = 'pool.path="/mnt/nowhere/pool.jsonl?token=canary-tk-2"'
    outcome = dry(run, inputs, tmp_path, *axis, missing, flags=flags, code=2)
    (plan,) = tmp_path.rglob("plan.json")
    (problem, *_) = json.loads(plan.read_text())["problems"].values()
    assert "pool.jsonl?token=***" in problem
    assert "/mnt/nowhere" not in plan.read_text()
    assert "canary-tk-2" not in outcome.out + outcome.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert ("multirun.yaml" in [path.name for path in written]) == bool(flags)
    assert not [path for path in written if b"canary-tk-2" in path.read_bytes()]


def test_what_the_store_has_is_not_planned_again(inputs: Inputs, tmp_path: Path) -> None:
    store = tmp_path / "store"
    paths = [f"paths.store_dir={store}", f"paths.output_dir={tmp_path / 'out'}", "logger=none", "warmup=none"]
    select(compose_select([*inputs.arguments, *paths]))
    assert plan_of(inputs, store, "warmup=none").missing == []
    assert plan_of(inputs, store, "warmup=none", "pooler=max", "fallback=zero", "selection.count=2").missing == []
    assert [cost.stage for cost in plan_of(inputs, store, "warmup=none", "saliency=row").missing] == ["score"]
    assert [cost.stage for cost in plan_of(inputs, store).missing] == ["warmup", "fingerprint", "score"]


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("random", []),
        ("bm25", []),
        ("trim_plus", ["fingerprint", "score"]),
        ("rds", ["fingerprint", "score"]),
        ("perplexity", ["score"]),
        ("ifd", ["score", "score"]),
    ],
)
def test_every_pass_of_a_method_is_planned(inputs: Inputs, tmp_path: Path, method: str, stages: list[str]) -> None:
    plan = plan_of(inputs, tmp_path / "store", "warmup=none", f"method={method}")
    assert [cost.stage for cost in plan.missing] == stages
    measured = estimate(plan)
    assert all(measured.times.get(cost, 0) > 0 for cost in plan.missing)


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("less", ["warmup", *["fingerprint", "score"] * 2]),
        pytest.param("tagcos", ["warmup", "score", "score"], marks=pytest.mark.slow),
        ("s2l", ["warmup", "score", "score"]),
        ("cld", ["warmup", *["fingerprint"] * 3, *["score"] * 3]),
    ],
)
def test_every_checkpoint_of_a_method_is_planned(
    inputs: Inputs, tmp_path: Path, method: str, stages: list[str]
) -> None:
    store, overrides = tmp_path / "store", [f"method={method}", "method.num_checkpoints=2", "warmup.fraction=0.5"]
    plan = plan_of(inputs, store, *overrides)
    assert [cost.stage for cost in plan.missing] == stages
    measured = estimate(plan)
    assert all(measured.times.get(cost, 0) > 0 for cost in plan.missing)
    paths = [f"paths.store_dir={store}", f"paths.output_dir={tmp_path / 'out'}", "logger=none"]
    done = select(compose_select([*inputs.arguments, *paths, *overrides])).manifest["stages"]
    for stage in {*stages} - {"warmup"}:  # which leaves out records without a response
        assert sum(cost.tokens for cost in plan.missing if cost.stage == stage) == done[stage]["tokens"]
    assert plan_of(inputs, store, *overrides).missing == []


@pytest.mark.slow
def test_a_training_is_planned_with_a_coreset_that_is_not_known_yet(inputs: Inputs, tmp_path: Path) -> None:
    store = tmp_path / "store"
    held_out = inputs.root / "targets.jsonl"
    overrides = [
        *inputs.arguments, f"paths.store_dir={store}", f"paths.output_dir={tmp_path / 'out'}", "warmup=none",
        f"evaluation.path={held_out}", "logger=none", "selection.count=4", "train.epochs=1",
    ]  # fmt: skip
    settings = compose_train(overrides)
    plan = plan_jobs({0: settings})
    assert [cost.stage for cost in plan.missing] == [
        "fingerprint", "score", "finetune", "evaluate_before", "evaluate_after",
    ]  # fmt: skip
    (tuning,) = (cost for cost in plan.missing if cost.stage == "finetune")
    assert tuning.assumed == "a coreset of 4 records of the pool's lengths"
    assert all(estimate(plan).times.get(cost, 0) > 0 for cost in plan.missing)
    train(settings)
    assert plan_jobs({0: settings}).missing == [], "the coreset is known now, and all that follows from it is there"
    other = plan_jobs({0: compose_train([*overrides, "train.epochs=2"])})
    assert [cost.stage for cost in other.missing] == ["finetune", "evaluate_after"]
    assert other.missing[0].assumed == ""


def test_disk_is_computed_from_what_the_stages_write(inputs: Inputs, tmp_path: Path) -> None:
    store = tmp_path / "store"
    plan = plan_of(inputs, store)
    found = estimate(plan)
    computed = {cost.stage: found.sizes.get(cost, 0) for cost in plan.missing}
    paths = [f"paths.store_dir={store}", f"paths.output_dir={tmp_path / 'out'}", "logger=none"]
    select(compose_select([*inputs.arguments, *paths]))
    for stage, folder, file in (
        ("warmup", "warmup", "*.safetensors"), ("fingerprint", "signals", "*"), ("score", "score", "similarity-*"),
    ):  # fmt: skip
        sizes = [path.stat().st_size for path in (store / folder).rglob(file) if path.is_file()]
        assert computed[stage] / 2 < sum(sizes) < 2 * computed[stage] + 10_000, stage


@pytest.mark.slow
def test_seconds_count_a_shared_prefix_once(inputs: Inputs, tmp_path: Path) -> None:
    records = [json.loads(line) for line in (inputs.root / "pool.jsonl").read_text().splitlines()]
    shared = [{**record, "prompt": "How many coins remain, if each box holds twelve? " * 8} for record in records]
    (tmp_path / "alike.jsonl").write_text("".join(json.dumps(record) + "\n" for record in shared))
    seconds, tokens, disk = [], [], []
    for share in ("true", "false"):
        overrides = [f"pool.path={tmp_path / 'alike.jsonl'}", f"scoring.share_prefixes={share}", "warmup=none"]
        plan = plan_of(inputs, tmp_path / "store", *overrides)
        (cost,) = (cost for cost in plan.missing if cost.stage == "score")
        seconds.append(cost.computed())
        tokens.append(cost.tokens)
        disk.append(estimate(plan).sizes[cost])
    assert seconds[0] < 0.6
    assert seconds[1] == 1
    assert tokens[0] == tokens[1]
    assert disk[0] == disk[1]


def test_lora_that_finds_nothing_to_train_is_told_in_the_plan(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    told = dry(run, inputs, tmp_path, "warmup.lora_targets=[nothing]", code=2)
    assert "cannot run: #0: warmup.lora_targets=nothing: the model has none of these modules" in told.out


def test_a_training_needs_more_time_and_memory_than_a_forward_pass(inputs: Inputs, tmp_path: Path) -> None:
    paths = [f"paths.store_dir={tmp_path / 'store'}", f"paths.output_dir={tmp_path / 'out'}"]
    coreset = [f"coreset.path={inputs.root / 'targets.jsonl'}", f"evaluation.path={inputs.root / 'targets.jsonl'}"]
    axes = [("train=lora",), ("train=lora", "train.gradient_checkpointing=true"), ("train=full",)]
    plan = plan_jobs({
        number: compose_train([*inputs.arguments, *paths, *coreset, *axis]) for number, axis in enumerate(axes)
    })  # fmt: skip
    lora, frugal, full = (cost for cost in plan.missing if cost.stage == "finetune")
    evaluation = next(cost for cost in plan.missing if cost.stage == "evaluate_before")
    assert factor_of(evaluation) < factor_of(lora) < factor_of(frugal, recomputes=True)
    assert lora.load is not None
    model = lora.load()
    assert training_need(evaluation, model) is None
    needs = [training_need(cost, model) for cost in (lora, frugal, full)]
    bytes_of = [need.bytes for need in needs if need is not None]
    assert 0 < bytes_of[1] < bytes_of[0]
    assert bytes_of[2] > 12 * sum(weight.numel() for weight in model.parameters())
    assert [need.micro.recomputes for need in needs if need is not None] == [False, True, False]


def test_full_fine_tuning_can_be_measured(inputs: Inputs, tmp_path: Path) -> None:
    plan = plan_jobs({
        0: compose_train([
            *inputs.arguments, f"paths.store_dir={tmp_path / 'store'}", f"paths.output_dir={tmp_path / 'out'}",
            f"coreset.path={inputs.root / 'targets.jsonl'}", "train=full",
        ])
    })  # fmt: skip
    assert [cost.stage for cost in plan.missing] == ["finetune"]
    measured = estimate(plan)
    assert measured.times[plan.missing[0]] > 0
    weights = (inputs.root / "tiny" / "model.safetensors").stat().st_size
    assert measured.sizes[plan.missing[0]] == pytest.approx(weights, rel=0.1), "the whole model is kept"


@pytest.mark.slow
def test_a_dry_run_leaves_the_record_of_a_finished_run_alone(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    overrides = ["warmup=none", "method=random", f"paths.store_dir={tmp_path / 'store'}"]
    done = run(*inputs.arguments, *overrides, f"hydra.run.dir={tmp_path / 'out'}")
    assert done.code == 0, done.err
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    dry(run, inputs, tmp_path, "warmup=none", "scoring.profile=true", "seed=1")
    dry(run, inputs, tmp_path, "warmup=none", "seed=1,2", flags=("-m",))
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert {path.parent.name for path in after.keys() - before.keys()} == {"plan"}
    assert not (tmp_path / "profile").exists()
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"plan"}


@pytest.mark.slow
def test_a_cell_that_cannot_be_measured_leaves_the_others_their_plan(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    shutil.copytree(inputs.root / "tiny", tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    models = f"model.path={inputs.root / 'tiny'},{tmp_path / 'broken'}"
    told = dry(run, inputs, tmp_path, "warmup=none", models, flags=("-m",), code=2)
    assert lines_of(told.out)["score"] == ["2", "0", "2", "2"]
    assert re.search(r"cannot run: #1 \(model.path=\S+broken\): model.path=broken: cannot be loaded", told.out)


@pytest.mark.slow
def test_jobs_with_a_wrong_configuration_keep_their_numbers(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    told = dry(run, inputs, tmp_path, "method=random,embedding,bm25", "max_length=10,0", flags=("-m",), code=2)
    assert "plan of 6 jobs, without the 4 that cannot run" in told.out
    problems = json.loads((tmp_path / "sweep" / "plan" / "plan.json").read_text())["problems"]
    assert set(problems) == {"1", "2", "3", "5"}
    only = dry(run, inputs, tmp_path, "max_length=0", "pooler=mean,max", flags=("-m",), code=2)
    assert "Launching" not in only.out
    assert "no job can run" in only.out


def test_dry_run_is_no_axis(run: Run, inputs: Inputs, tmp_path: Path) -> None:
    outcome = run("-m", *inputs.arguments, "dry_run=true,false")
    assert outcome.code == 2
    assert outcome.last == "error: dry_run=true,false: all jobs are planned or none; give dry_run=true"


def test_tokens_are_those_of_the_run(inputs: Inputs, tmp_path: Path) -> None:
    store = tmp_path / "store"
    planned = plan_of(inputs, store)
    paths = [f"paths.store_dir={store}", f"paths.output_dir={tmp_path / 'out'}", "logger=none"]
    stages = select(compose_select([*inputs.arguments, *paths])).manifest["stages"]
    tokens = {cost.stage: cost.tokens for cost in planned.missing}
    assert tokens["score"] == stages["score"]["tokens"]
    assert tokens["fingerprint"] == stages["fingerprint"]["tokens"]
    assert tokens["warmup"] == stages["warmup"]["tokens"]


def test_an_unbuilt_result_cannot_be_read(store: Store) -> None:
    from trim_lightning.store import StageKey

    entry = UnbuiltEntry(StageKey("score", 1))
    assert entry.facts["anything"] == 0
    assert not entry.cached
    with pytest.raises(NotBuilt):
        entry.path  # noqa: B018


def test_a_training_that_will_not_fit_is_told_in_the_plan(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_jobs({
        0: compose_train([
            *inputs.arguments, f"paths.store_dir={tmp_path / 'store'}", f"paths.output_dir={tmp_path / 'out'}",
            f"coreset.path={inputs.root / 'targets.jsonl'}",
        ])
    })  # fmt: skip
    roomy = plan_text(plan, estimate(plan), 0)
    assert "finetune: its backward passes need" in roomy
    assert "micro-batches of up to 2,048 tokens)" in roomy
    monkeypatch.setattr("trim_lightning.sweep.work.room_for_training", lambda device, weights: 1000.0)
    cramped = plan_text(plan, estimate(plan), 0)
    assert "activations recomputed), more than the 1.0 kB that this device has for them: lower max_length" in cramped


def test_a_plan_of_several_devices_says_what_each_of_them_holds(inputs: Inputs, tmp_path: Path) -> None:
    shared = [
        *[value for value in inputs.arguments if not value.startswith("trainer")],
        f"paths.store_dir={tmp_path / 'store'}", f"paths.output_dir={tmp_path / 'out'}",
        f"coreset.path={inputs.root / 'targets.jsonl'}", "dry_run=true", "model.dtype=float32",
    ]  # fmt: skip
    fsdp, four = ("trainer=fsdp", "trainer.accelerator=cpu"), "trainer.devices=4"
    axes = (("trainer=cpu",), ("trainer=ddp_cpu", four), (*fsdp, four), ("trainer=cpu", "train=full"),
            (*fsdp, four, "train=full"))  # fmt: skip
    plans = [plan_jobs({0: compose_train([*shared, *axis])}) for axis in axes]
    assert not any(plan.problems for plan in plans), "a plan needs no launcher"
    costs = [next(cost for cost in plan.missing if cost.stage == "finetune") for plan in plans]
    assert costs[0].load is not None
    model = costs[0].load()
    needs: list[Any] = [training_need(cost, model) for cost in costs]
    one, two, divided, full, divided_full = needs
    weights = sum(weight.nbytes for weight in model.parameters())
    head = model.get_output_embeddings().weight.nbytes
    layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
    assert [one.weights, two.weights] == [weights, weights]
    assert divided.weights == (weights - head) / 4 + head + 3 * layer
    assert one.micro.tokens > two.micro.tokens == divided.micro.tokens, "a step has a part for every device"
    assert two.room < one.room / 3.9, "they share the machine's memory"
    kept, own = full.bytes - divided_full.bytes, (weights - head) / 4 + head
    assert kept >= 3 * (weights - own), "gradients and moments are divided as the weights are"
    text = plan_text(plans[2], estimate(plans[2]), 0)
    assert "of memory for 4 processes" in text
    assert "finetune: on each of 4 devices its backward passes need" in text
