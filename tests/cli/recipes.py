"""The recipes of ``conf/experiment`` and ``conf/hparams_search``, and the sweeps in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from trim_lightning.settings.compose import config_directory, register_schemas

CONF = config_directory()


def read(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict), path
    return content


def axes_of(content: dict[str, Any]) -> dict[str, list[str]]:
    """Swept key or group to its values, as Hydra expands them; of an interval its ends. Empty without a sweep."""
    params = content.get("hydra", {}).get("sweeper", {}).get("params", {})
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        overrides = parser.parse_overrides([f"{name}={values}" for name, values in params.items()])
        axes: dict[str, list[str]] = {}
        for override in overrides:
            interval: Any = override.value()
            axes[override.get_key_element()] = (
                list(override.sweep_string_iterator())
                if override.is_discrete_sweep()
                else [str(interval.start), str(interval.end)]
            )
        return axes


def sweeps() -> dict[str, dict[str, list[str]]]:
    """Name of every experiment that is a multirun to its axes."""
    recipes = {path.stem: read(path) for path in sorted((CONF / "experiment").glob("*.yaml"))}
    multiruns = {
        name: content for name, content in recipes.items() if content.get("hydra", {}).get("mode") == "MULTIRUN"
    }
    return {name: axes_of(content) for name, content in multiruns.items()}
