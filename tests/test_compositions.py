"""A remembered composition is the one that Hydra makes anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from compositions import remember_compositions
from trim_lightning.settings.compose import config_directory, register_schemas
from trim_lightning.settings.guard import guard_hydra


def composed(command: str, *overrides: str) -> str:
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = compose(command, overrides=list(overrides), return_hydra_config=True)
        return OmegaConf.to_yaml(config, resolve=False) + str(OmegaConf.is_struct(config))


CASES = [
    ("select",),
    ("select", "seed=4", "+pool.where.topic=[maths]"),
    ("train", "seed=4"),
    ("select", "pooler=max", "pooler.q=0.2", "hydra.run.dir=x"),
    ("select", "pooler=max", "hydra/job_logging=none", "+hydra.job.env_set.NAME=x"),
    ("train", "debug=fast", "pool.limit=7"),
]


@pytest.fixture
def anew(compositions: pytest.MonkeyPatch) -> Iterator[None]:
    """Hydra as it is, and then a memory of its own again."""
    compositions.undo()
    yield
    remember_compositions(compositions)


def test_what_is_remembered_is_what_is_made(anew: None) -> None:
    register_schemas()
    expected = {case: composed(*case) for case in CASES}
    assert len(set(expected.values())) == len(expected)
    with pytest.MonkeyPatch.context() as patch:
        remember_compositions(patch)
        for _ in range(2):  # what a case was given or changed must not reach the others
            for case, config in expected.items():
                assert composed(*case) == config, case


def test_a_command_composes_what_it_is_asked_again_once(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    guard_hydra()
    made: list[object] = []
    real = ConfigLoaderImpl._load_configuration_impl
    monkeypatch.setattr(
        ConfigLoaderImpl,
        "_load_configuration_impl",
        lambda *given, **named: made.append(named) or real(*given, **named),
    )
    register_schemas()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()

        def ask(*overrides: str) -> DictConfig:
            return loader.load_configuration("select", list(overrides), RunMode.RUN)

        first = ask("seed=4")
        before = OmegaConf.to_yaml(first)
        with open_dict(first):
            first.seed, first.hydra.job.id = 5, "changed"
        assert OmegaConf.to_yaml(ask("seed=4")) == before
        assert len(made) == 1
        assert ask("seed=6").seed == 6
        assert len(made) == 2
        for _ in range(2):
            with pytest.raises(ConfigCompositionException, match="seeed"):
                ask("seeed=1")


def test_a_choice_that_cannot_be_stays_a_mistake() -> None:
    register_schemas()
    for _ in range(2):
        with pytest.raises(MissingConfigException, match="pooler/meen"):
            composed("select", "pooler=meen")
        with pytest.raises(ConfigCompositionException, match="seeed"):
            composed("select", "pooler=max", "seeed=1")
