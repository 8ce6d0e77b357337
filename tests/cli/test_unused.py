"""Overrides that nothing of a run reads are said; those that are read, and those of a sweep, are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from composing import compose_select, compose_train
from trim_lightning.pipeline.unused import unused_keys

from .conftest import Inputs, Run


@pytest.mark.parametrize(
    ("overrides", "remarks"),
    [
        (["saliency.num_layers=3", "pooler=mean", "target.num_examples=4", "warmup.epochs=1"], []),
        (["method=random", "selection.count=3", "seed=7", "warmup=none"], []),
        (
            ["method=random", "saliency.num_layers=99", "pooler=max", "target.num_examples=3"],
            ["saliency.num_layers, pooler, target.num_examples: have no effect with method=random"],
        ),
        (["method=bm25", "seed=3", "warmup.fraction=1"], ["warmup.fraction: has no effect with method=bm25"]),
        (["method=rds", "warmup.epochs=3"], ["warmup.epochs: has no effect with method=rds method.use_warmup=false"]),
        (["method=ifd", "warmup.epochs=3"], []),
        (
            ["method=random", "saliency.num_layers=2", "saliency.num_layers=3"],
            ["saliency.num_layers: has no effect with method=random"],
        ),
        (["method=rds", "method.use_warmup=true", "warmup.epochs=3"], []),
        (["warmup=none", "warmup.epochs=3"], ["warmup.epochs: has no effect with warmup=none"]),
        (["pooler=max", "pooler.k=4"], ["pooler.k: has no effect with pooler=max"]),
        (["pooler=topk_mean", "pooler.k=4", "pooler.token_weight=idf"], []),
        (
            ["saliency=uniform", "saliency.num_layers=3"],
            ["saliency.num_layers: has no effect with saliency.row_weight=0 saliency.column_weight=0"],
        ),
        (["fallback=zero", "fallback.penalty=0.5"], ["fallback.penalty: has no effect with fallback.mode=zero"]),
        (["fallback.penalty=0.5", "saliency.num_layers=3"], []),
        (
            ["method=trim_plus", "warmup.epochs=2"],
            ["warmup.epochs: has no effect with method=trim_plus method.use_warmup=false"],
        ),
        (["method=trim_plus", "pooler=mean", "fallback=zero"], []),
        (
            ["method=trim_plus", "method.trim_weight=0", "pooler=mean", "method.length_exponent=0"],
            ["pooler: has no effect with method.trim_weight=0"],
        ),
        (
            ["method=trim_plus", "method.alignment_weight=0", "method.length_exponent=0"],
            ["method.length_exponent: has no effect with method.alignment_weight=0"],
        ),
        (
            ["pool=jsonl", "pool.path=a.jsonl", "++pool.families=[syllogism]", "target.families=[syllogism]"],
            ["pool.families: has no effect with pool=jsonl"],
        ),
        (
            ["method=less", "scoring.save_token_scores=true"],
            ["scoring.save_token_scores: has no effect with method=less"],
        ),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named_with_the_reason(overrides: list[str], remarks: list[str]) -> None:
    assert unused_keys(compose_select([*overrides, "paths.output_dir=out"]), overrides) == remarks
    assert unused_keys(compose_train([*overrides, "paths.output_dir=out"]), overrides) == remarks


def test_targets_say_what_is_generated_to_measure() -> None:
    overrides = ["method=random", "target.families=[chain_sum]"]
    settings = compose_train([*overrides, "evaluation=generated", "paths.output_dir=out"])
    assert unused_keys(settings, overrides) == []
    assert unused_keys(settings, ["target.num_examples=3"]) == ["target.num_examples: has no effect with method=random"]
    assert unused_keys(compose_train([*overrides, "paths.output_dir=out"]), overrides) != []


def test_a_given_coreset_leaves_a_selection_nothing_to_do() -> None:
    overrides = [
        "coreset.path=c.jsonl", "method=random", "saliency.num_layers=9", "pool=jsonl", "pool.path=p.jsonl",
        "target.num_examples=3", "warmup=none", "scope=response", "selection.count=3", "train.epochs=1",
    ]  # fmt: skip
    settings = compose_train([*overrides, "paths.output_dir=out"])
    said = "method, saliency.num_layers, target.num_examples, warmup, scope: have no effect with coreset.path"
    assert unused_keys(settings, overrides) == [said]  # the others are told where the coreset is opened


def test_a_recipe_may_set_what_a_method_does_not_read() -> None:
    overrides = ["experiment=demo", "method=random"]
    assert unused_keys(compose_select([*overrides, "paths.output_dir=out"]), overrides) == []


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["target.num_examples=50"], "target.num_examples=50: there are only 8; all are taken"),
        (
            ["target.num_examples=9", "target.single_groups=true"],
            "target.num_examples=9: there are only 8; all are taken",
        ),
        (
            ["target.num_examples=7", "target.group_field=subtask"],
            "target.num_examples=7: group 'alpha' has only 4 (2 groups have fewer); all are taken",
        ),
        (["target.num_examples=8"], None),
        ([], None),
    ],
)  # fmt: skip
def test_fewer_targets_than_asked_for(keys: list[str], told: str | None, run: Run, inputs: Inputs) -> None:
    done = run(*inputs.arguments, "method=bm25", "logger=none", "paths.output_dir=out", *keys)
    assert done.code == 0
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert [line for line in manifest["warnings"] if "num_examples" in line] == ([told] if told else [])


def test_it_is_said_at_the_start_and_not_in_a_sweep(run: Run, inputs: Inputs) -> None:
    given = [*inputs.arguments, "method=longest", "pooler=max", "dry_run=true"]
    single = run(*given)
    assert single.code == 0
    said = "target, target.path, saliency.num_layers, pooler: have no effect with method=longest"
    assert (single.out + single.err).count(said) == 1
    sweep = run("-m", *given, "seed=1,2")
    assert sweep.code == 0
    assert "no effect" not in sweep.out + sweep.err
