"""The paths that a manifest leaves out: ``local.json`` beside it, for the commands that look them up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trim_lightning.files.json_files import read_json_object, with_leaves
from trim_lightning.privacy.keys import hide_keys
from trim_lightning.privacy.paths import shareable_text

LOCAL = "local.json"


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The texts of nested mappings and lists by dotted key."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, f"{prefix}{name}.")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from leaves(item, f"{prefix}{place}.")
    elif isinstance(value, str):
        yield prefix.removesuffix("."), value


def write_local(config: Mapping[str, Any], directory: Path) -> None:
    """Keep the paths that the manifest leaves out, by dotted config key, each with what the manifest has instead."""
    from trim_lightning.files.atomic import write_text

    here = {name: hide_keys(text) for name, text in leaves(config)}
    content = {
        "note": "the paths of this machine that manifest.json leaves out; not meant to be shared",
        "config": {
            name: {"shared": shareable_text(text), "here": text}
            for name, text in here.items()
            if shareable_text(text) != text
        },
    }
    write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", directory / LOCAL)


def read_local(directory: Path) -> dict[str, dict[str, str]]:
    """The paths that a run's manifest leaves out, as `write_local` keeps them; none if the run came without them."""
    try:
        found = read_json_object(directory / LOCAL)["config"]
        return {
            str(name): {"shared": str(entry["shared"]), "here": str(entry["here"])} for name, entry in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def with_local(config: Any, paths: Mapping[str, Mapping[str, str]]) -> Any:
    """A manifest's config with the paths that it leaves out; a value that was changed since stays as it is."""

    def here(name: str, value: Any) -> Any:
        entry = paths.get(name)
        return entry["here"] if entry is not None and entry["shared"] == value else value

    return with_leaves(config, here)
