"""Between Hydra and the rest: schemas, where ``conf/`` is, and errors in the user's words."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trim_lightning.errors import UserError
from trim_lightning.files.json_files import with_leaves
from trim_lightning.settings.key import known_keys
from trim_lightning.settings.mistakes import explain, no_such_key
from trim_lightning.settings.schema import SelectSettings, TrainSettings

Settings = TypeVar("Settings")
SCHEMAS: dict[str, type] = {"select": SelectSettings, "train": TrainSettings}


def config_directory() -> Path:
    """The folder of YAML files: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parents[1] / "conf"):
        if folder.is_dir():
            return folder
    raise UserError("the installation is incomplete: it has no conf folder; install trim-lightning again")


@functools.cache
def register_schemas() -> None:
    """Give Hydra the types and defaults of every key.

    Free mappings (``trainer``, ``method``, ``where`` ...) take new keys without Hydra's plus sign. The resolver
    ``${complement:x}`` gives 1 - x, for two weights that share a whole.
    """
    OmegaConf.register_new_resolver("complement", lambda share: round(1 - float(share), 12), replace=True)
    # Hydra copies this store at each of a hundred look-ups, and again whatever it takes from it
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    for command, kind in SCHEMAS.items():
        schema = OmegaConf.structured(kind)
        for name, _, default in known_keys(kind):
            if isinstance(default, dict):
                OmegaConf.set_struct(OmegaConf.select(schema, name), False)
        ConfigStore.instance().store(name=f"{command}_schema", node=schema)


def to_settings(config: DictConfig, kind: type[Settings]) -> Settings:
    """Turn a composed config into plain settings objects.

    Raises:
        UserError: for an unknown key, a missing value or one of the wrong type.
    """
    for name in unknown_keys(config, kind):
        raise UserError(no_such_key(name, kind))
    try:
        settings = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, kind)) from None
    assert isinstance(settings, kind)
    return settings


def as_plain(value: Any) -> Any:
    """A value from a file in which nothing is looked up: ``${oc.env:NAME}`` and the like stay the text that they are.

    Raises:
        ValueError: for a text with both an interpolation and a backslash, which cannot be kept as it is.
    """

    def escaped(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, str) or "${" not in leaf:
            return leaf
        if "\\" in leaf:
            raise ValueError("a text with ${ and a backslash")
        return leaf.replace("${", "\\${")

    return with_leaves(value, escaped)


def composed(command: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a command with overrides as on its command line, without running Hydra's application."""
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return compose(command, overrides=list(overrides))


def unknown_keys(config: DictConfig, schema: type, prefix: str = "") -> Iterator[str]:
    """Yield the keys of a config that its schema lacks: Hydra's plus sign lets them in."""
    known = {spec.name: spec for spec in dataclasses.fields(schema)}
    for name in map(str, config):
        if name not in known:
            yield f"{prefix}{name}"
            continue
        default = known[name].default_factory
        inner = config._get_node(name)
        if dataclasses.is_dataclass(default) and isinstance(default, type) and isinstance(inner, DictConfig):
            yield from unknown_keys(inner, default, f"{prefix}{name}.")


def check_hydra_keys(config: DictConfig) -> None:
    """Refuse keys of Hydra's that do not exist: a plus sign lets them in, and nothing reads them.

    Raises:
        UserError: naming the first one.
    """
    if "hydra" in config:
        for name in unknown_keys(config.hydra, HydraConf, "hydra."):
            if name != "hydra.env":  # the group hydra/env puts it there, though the schema lacks it
                raise UserError(no_such_key(name, SelectSettings))
