"""Hydra's compositions, remembered: each choice of options is composed once in a test process, and copied for the rest.

Composing takes over a tenth of a second, and most tests compose at least once. What Hydra makes of the values that
a test overrides is always Hydra's own work; a composition that fails is never remembered.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig


def remember_compositions(patch: pytest.MonkeyPatch) -> None:
    """Let Hydra take what it composed from the same folders, options and defaults before."""
    lists: dict[Any, DefaultsList] = {}
    configs: dict[Any, DictConfig] = {}
    make_list, compose = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list

    def folders(repo: IConfigRepository) -> tuple[str, ...]:
        return tuple(source.path for source in repo.get_sources())

    def remembered_list(
        repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **options: bool
    ) -> DefaultsList:
        given = Overrides(repo=repo, overrides_list=overrides_list)
        values = set(map(id, given.config_overrides))
        chosen = tuple(override.input_line for override in overrides_list if id(override) not in values)
        key = (folders(repo), config_name, chosen, *options.items())
        if key not in lists:
            lists[key] = make_list(repo, config_name, overrides_list, **options)
        made = copy.copy(lists[key])
        made.config_overrides = given.config_overrides
        return made

    def remembered_config(self: ConfigLoaderImpl, defaults: Sequence[Any], repo: IConfigRepository) -> DictConfig:
        key = (folders(repo), repr(defaults))
        if key not in configs:
            configs[key] = compose(self, defaults=list(defaults), repo=repo)
        return copy.deepcopy(configs[key])

    def with_shared_sources(self: CachingConfigRepository, delegate: ConfigRepository) -> None:
        self.delegate, self.cache = copy.copy(delegate), {}  # Hydra copies all that the sources hold, and reads it only

    patch.setattr(CachingConfigRepository, "__init__", with_shared_sources)
    patch.setattr(config_loader_impl, "create_defaults_list", remembered_list)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", remembered_config)
