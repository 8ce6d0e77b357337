"""Every option of every group composes into settings that pass their checks; keys are spelled out to the user."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.recipes import CONF, axes_of, read, sweeps
from composing import compose_select, compose_settings
from trim_lightning.errors import UserError
from trim_lightning.methods.base import load_selector, method_names
from trim_lightning.models.source import BUNDLED
from trim_lightning.pipeline.checks import check_settings
from trim_lightning.settings.compose import SCHEMAS
from trim_lightning.settings.key import known_keys
from trim_lightning.settings.mistakes import GROUPS, RECIPES, closest, no_such_key
from trim_lightning.settings.schema import POOLERS, SelectSettings, TrainSettings

OUTPUT = "paths.output_dir=out"


def groups_of(command: str) -> set[str]:
    """The groups in a command's defaults list."""
    entries = read(CONF / f"{command}.yaml")["defaults"]
    return {name for entry in entries if isinstance(entry, dict) for name in entry if not name.startswith("override ")}


def options() -> list[tuple[str, str, str]]:
    """``(command, group, option)`` of every file below ``conf``, Hydra's own group aside."""
    found = []
    for path in sorted(CONF.rglob("*.yaml")):
        group = path.parent.relative_to(CONF).as_posix()
        if group == "." or group.split("/")[0] == "hydra":
            continue
        commands = [command for command in SCHEMAS if group in groups_of(command)]
        assert commands, f"no command uses conf/{group}"
        for command in commands if group in RECIPES else commands[:1]:
            found.append((command, group, path.stem))
    return found


def assert_holds(settings: Any, content: Mapping[str, Any]) -> None:
    """The values of a YAML file are those of the settings."""
    for name, value in content.items():
        held = settings[name] if isinstance(settings, dict) else getattr(settings, name)
        if isinstance(value, dict):
            assert_holds(held, value)
        elif value != "???" and not str(value).startswith("${"):
            assert held == value, name


@pytest.mark.parametrize(("command", "group", "option"), options())
def test_option(command: str, group: str, option: str) -> None:
    choice = f"{group}={option}"
    content = read(CONF / group / f"{option}.yaml")
    content.pop("defaults", None)
    axes = axes_of(content)
    content.pop("hydra", None)
    is_global = group in RECIPES
    if choice == "hparams_search=optuna" and not importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper"):
        with pytest.raises(UserError, match=r"pip install 'trim-lightning\[optuna\]'"):
            compose_settings(command, SCHEMAS[command], [choice, OUTPUT])
        return
    parts = {*content, *(name.partition(".")[0] for name in axes)}
    if is_global and not parts <= {spec.name for spec in dataclasses.fields(SCHEMAS[command])}:
        one_cell = [f"{name}={values[0]}" for name, values in axes.items()]
        with pytest.raises(UserError, match=r"(evaluation|train)\S*: a key of trim-train"):  # another command's
            compose_settings(command, SCHEMAS[command], [choice, *one_cell, OUTPUT])
        return
    for place in range(max(map(len, axes.values()), default=0)):  # every value of every axis
        cell = [f"{name}={values[place % len(values)]}" for name, values in axes.items()]
        settings = compose_settings(command, SCHEMAS[command], [choice, *cell, OUTPUT])
        check_settings(settings)
        load_selector(settings.method)
    left_to_the_user = [f"{group}.{name}=somewhere" for name, value in content.items() if value == "???"]
    settings = compose_settings(command, SCHEMAS[command], [choice, *left_to_the_user, OUTPUT])
    assert isinstance(settings, SelectSettings)
    check_settings(settings)
    if group == "paths":  # it holds references only
        assert settings.paths.output_dir == "out"
    else:
        assert_holds(settings if is_global else getattr(settings, group), content)
    load_selector(settings.method)


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_group_is_known_and_has_options(command: str) -> None:
    groups = groups_of(command) - {"hydra"}
    assert groups <= set(GROUPS)
    assert {path.name for path in CONF.iterdir() if path.is_dir()} >= groups
    composed = compose_settings(command, SCHEMAS[command], [OUTPUT])
    fields = {spec.name for spec in dataclasses.fields(composed)}  # type: ignore[arg-type]
    assert groups - {*RECIPES} <= fields


def test_yaml_files_and_schemas_agree() -> None:
    assert {path.stem for path in (CONF / "pooler").glob("*.yaml")} == set(POOLERS)
    methods = {path.stem for path in (CONF / "method").glob("*.yaml")}
    assert methods == set(method_names())


def test_defaults() -> None:
    settings = compose_select([OUTPUT])
    check_settings(settings)
    assert settings.model.path == BUNDLED
    assert (settings.pool.source, settings.target.source, settings.target.num_examples) == (
        "generated",
        "generated",
        10,
    )
    assert (settings.selection.fraction, settings.selection.count, settings.selection.tokens) == (None, None, None)
    assert (settings.warmup.enabled, settings.warmup.fraction) == (True, 0.05)
    assert (settings.saliency.num_layers, settings.saliency.row_weight, settings.saliency.column_weight) == (
        6,
        0.5,
        0.5,
    )
    assert (settings.fallback.mode, settings.fallback.penalty, settings.fallback.nearest) == ("scale", 0.9, "embedding")
    weights = (settings.pooler.mean_weight, settings.pooler.max_weight, settings.pooler.coverage_weight)
    assert (settings.pooler.name, weights) == ("mean_max_coverage", (0.5, 0.5, 0.05))
    assert (settings.max_length, settings.seed, settings.scope, settings.logger.name) == (2048, 0, "all", "csv")


def test_the_recipes_that_the_documentation_promises_are_there() -> None:
    expected = {
        "pooling_ablation": 7, "layer_ablation": 3, "saliency_ablation": 4, "row_weight_ablation": 5,
        "fallback_ablation": 24, "scope_ablation": 3, "budget_curve": 4, "target_size": 4, "target_noise": 4,
        "seed_spread": 5, "transfer": 8, "in_domain": 10,
    }  # fmt: skip
    cells = {name: len(list(itertools.product(*axes.values()))) for name, axes in sweeps().items()}
    assert cells.pop("method_table") == 5 * (len(method_names()) - 1)
    assert cells == expected


@pytest.mark.parametrize("recipe", ["experiment=row_weight_ablation"])
def test_the_weights_of_a_recipe_share_one(recipe: str) -> None:
    for row, column in ((0, 1), (0.1, 0.9), (0.25, 0.75), (1, 0)):
        saliency = compose_select([recipe, f"saliency.row_weight={row}", OUTPUT]).saliency
        assert (saliency.row_weight, saliency.column_weight) == (row, column)


def test_a_key_of_training_alone_is_named_as_such() -> None:
    for override in ("train.model=other", "evaluation.limit=3", "train=lora", "hparams_search=optuna"):
        with pytest.raises(UserError, match=r"^\S+: a key of trim-train, which trim-select does not have$"):
            compose_select([override, OUTPUT])


def test_store_directory_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIM_STORE_DIR", raising=False)
    assert compose_select([OUTPUT]).paths.store_dir == ".trim_store"
    monkeypatch.setenv("TRIM_STORE_DIR", "/shared/store")
    assert compose_select([OUTPUT]).paths.store_dir == "/shared/store"
    assert compose_select([OUTPUT, "paths.store_dir=here"]).paths.store_dir == "here"


def test_a_key_wins_over_an_option_whatever_the_order() -> None:
    for overrides in (["debug=fast", "pool.limit=7"], ["pool.limit=7", "debug=fast"]):
        assert compose_select([*overrides, OUTPUT]).pool.limit == 7


@pytest.mark.parametrize("plus", ["", "+"])
def test_free_mappings_take_new_keys(plus: str) -> None:
    settings = compose_select(
        [
            f"{plus}pool.where.topic=[maths,logic]",
            "target.exclude={source: web}",
            f"{plus}trainer.limit_predict_batches=2",
            "trainer.accelerator=cpu",
            OUTPUT,
        ]
    )
    assert settings.pool.where == {"topic": ["maths", "logic"]}
    assert settings.target.exclude == {"source": "web"}
    assert settings.trainer == {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "limit_predict_batches": 2}


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("selecton.fraction", "selection.fraction"),
        ("selection.fractoin", "selection.fraction"),
        ("pool.pth", "pool.path"),
        ("saliency.num_layer", "saliency.num_layers"),
        ("seeed", "seed"),
        ("maxlength", "max_length"),
        ("num_layers", "saliency.num_layers"),
        ("store_dir", "paths.store_dir"),
        ("path", "model.path or pool.path or target.path"),
        ("poolr", "pooler"),
        ("experimnt", "experiment"),
        ("pool.zzz", None),
        ("colour", None),
    ],
)
def test_suggested_key(name: str, guess: str | None) -> None:
    message = no_such_key(name, SelectSettings)
    assert message.startswith(f"{name}: no such key; ")
    assert message.endswith(f"did you mean {guess}?" if guess else "--cfg job prints all keys")


HYDRA_HINT = "--cfg hydra prints all of Hydra's"


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("hydra.swep.dir", "hydra.sweep.dir"),
        ("hydra.sweep.dri", "hydra.sweep.dir"),
        ("hydra.sweep.subdr", "hydra.sweep.subdir"),
        ("hydra.verbos", "hydra.verbose"),
        ("hydra.job.nam", "hydra.job.name"),
        ("hydra.zzz", None),
        ("hydra.launcher.n_jobs", None),
        ("hydra.job.env_set.NAME", None),
        ("hydra/launcer", "hydra/launcher"),
        ("hydra/zzz", None),
    ],
)
def test_suggested_key_of_hydra(name: str, guess: str | None) -> None:
    message = no_such_key(name, SelectSettings)
    assert message == f"{name}: no such key; " + (f"did you mean {guess}?" if guess else HYDRA_HINT)


def test_only_keys_of_the_command_are_suggested() -> None:
    assert no_such_key("evaluation.pth", SelectSettings).endswith("--cfg job prints all keys")
    assert no_such_key("evaluation.pth", TrainSettings).endswith("did you mean evaluation.path?")


KEYS = [key for key, *_ in known_keys(SelectSettings)]


@given(st.sampled_from(KEYS), st.data())
def test_one_dropped_letter_is_recognised(key: str, data: st.DataObject) -> None:
    group, _, last = key.rpartition(".")
    if len(last) < 5:
        return
    place = data.draw(st.integers(1, len(last) - 1))
    typo = f"{group}." * bool(group) + last[:place] + last[place + 1 :]
    if typo not in KEYS:
        guess = closest(typo, KEYS)
        assert guess is not None
        assert key in guess.split(" or ") or guess.rpartition(".")[0] == group


@pytest.mark.parametrize("key", [key for key, *_ in known_keys(TrainSettings)])
def test_every_key_has_a_meaning_and_a_valid_default(key: str) -> None:
    metadata, default = next((metadata, value) for name, metadata, value in known_keys(TrainSettings) if name == key)
    assert metadata["meaning"]
    assert not metadata["meaning"].endswith(".")
    if metadata["choices"] and default is not None:
        assert default in metadata["choices"]
    if isinstance(default, int | float) and not isinstance(default, bool):
        assert metadata["low"] is None or default >= metadata["low"]
        assert metadata["above"] is None or default > metadata["above"]
        assert metadata["high"] is None or default <= metadata["high"]
