"""Write the page of every configuration key from the schemas and ``conf/``, so that it cannot drift from them.

    python -m trim_lightning.config_reference docs/configuration.md

Without a path the page goes to standard output.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from trim_lightning.config import config_directory, register_schemas
from trim_lightning.methods.base import load_selector, method_names
from trim_lightning.settings import SelectSettings

COMMAND = "python -m trim_lightning.config_reference docs/configuration.md"
HEAD = f"""\
# Configuration

<!-- Written by `{COMMAND}`; do not edit. -->

Every key of `trim-select` (`python select.py`), its type, its default, what it may be, and what it means. Set a key
with `key=value`, pick an option of a group with `group=option`; a key that is not listed here is an error. The
default is what a run without overrides uses; `trim-select --cfg job` prints the keys of any command composed.

A list is written `'key=[a,b]'` and a mapping `'key={{field: value}}'`, in quotes because of the shell; `null` means
none. Overrides may have any order: a key given on the command line wins over the option of its group.
"""

FREE = {
    "method": "`method.name` is the selector; other keys under `method` are its own, as the options below list them.",
    "trainer": "Any argument of `lightning.Trainer` can be set under `trainer`; one that an option does not set is "
    "added with a plus sign, as in `+trainer.limit_predict_batches=2`. Callbacks, logger, checkpoints and "
    "the progress bar are the run's own.",
}
"""Groups whose keys no schema lists, and what may stand there."""

TYPE_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def reference_page() -> str:
    """The whole page in Markdown."""
    defaults = composed_defaults()
    groups = [spec for spec in dataclasses.fields(SelectSettings) if dataclasses.is_dataclass(defaults_of(spec))]
    single = [spec for spec in dataclasses.fields(SelectSettings) if spec.name not in {group.name for group in groups}]
    single = [spec for spec in single if spec.name not in FREE]
    parts = [HEAD, f"## Keys without a group\n\n{key_table(SelectSettings, single, defaults, '')}"]
    parts += [group_section(spec, defaults) for spec in groups]
    parts += [f"## {name}\n\n{text}\n\n{options_table(name)}" for name, text in FREE.items()]
    parts += [
        f"## {name}\n\nRecipes that set keys of several groups; none is on by default.\n\n{options_table(name)}"
        for name in ("experiment", "debug")
    ]
    return "\n".join(parts)


def defaults_of(spec: dataclasses.Field[Any]) -> Any:
    """The schema's default of one field."""
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def composed_defaults() -> dict[str, Any]:
    """The config of a run without overrides, its interpolations as they are written."""
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        container = OmegaConf.to_container(compose("select"), resolve=False)
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}


def group_section(spec: dataclasses.Field[Any], defaults: Mapping[str, Any]) -> str:
    """The section of one group: its keys, then the options that ``conf/`` has for it."""
    schema = type(defaults_of(spec))
    section = f"## {spec.name}\n\n{(schema.__doc__ or '').strip()}\n\n"
    section += key_table(schema, dataclasses.fields(schema), defaults[spec.name], f"{spec.name}.")
    options = options_table(spec.name)
    return section + (f"\n{options}" if options else "")


def key_table(
    schema: type, specs: Sequence[dataclasses.Field[Any]], defaults: Mapping[str, Any], prefix: str
) -> str:
    """A table row for each field of a settings class."""
    hints = typing.get_type_hints(schema)
    rows = [
        [
            f"`{prefix}{spec.name}`",
            type_name(hints[spec.name]),
            code(defaults[spec.name]),
            permitted(spec.metadata),
            spec.metadata["meaning"],
        ]
        for spec in specs
    ]
    return table(["key", "type", "default", "permitted", "meaning"], rows)


def type_name(hint: Any) -> str:
    """A type annotation in words: ``int | None`` is "whole number or null"."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else type_name(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "mapping"
    return TYPE_NAMES[hint]


def permitted(metadata: Mapping[str, Any]) -> str:
    """The choices or bounds of a key; empty where its type says all."""
    if metadata["choices"]:
        return ", ".join(code(choice) for choice in metadata["choices"])
    bounds = (("low", "≥"), ("above", ">"), ("high", "≤"))
    return ", ".join(f"{sign} {metadata[name]:g}" for name, sign in bounds if metadata[name] is not None)


def options_table(group: str) -> str:
    """The options of a group with what each sets; empty if ``conf/`` has no such folder."""
    chosen = default_options().get(group)
    rows = []
    for file in sorted((config_directory() / group).glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        mark = " (default)" if file.stem == chosen else ""
        values = ", ".join(f"`{name}={compact(value)}`" for name, value in leaves(content))
        rows.append([f"`{group}={file.stem}`{mark}", values, note_of(file) + own_keys(group, content)])
    return table(["option", "sets", "note"], rows) if rows else ""


def default_options() -> dict[str, str]:
    """Group to the option that ``conf/select.yaml`` picks."""
    entries = yaml.safe_load((config_directory() / "select.yaml").read_text(encoding="utf-8"))["defaults"]
    return {
        name.removeprefix("override "): option
        for entry in entries
        if isinstance(entry, dict)
        for name, option in entry.items()
    }


def leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of every value in a config file."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def note_of(file: Path) -> str:
    """The comment at the head of a config file."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def own_keys(group: str, content: Mapping[str, Any]) -> str:
    """For a method: the keys of its selector with their defaults."""
    if group != "method" or content.get("name") not in method_names():
        return ""
    specs = dataclasses.fields(load_selector({"name": content["name"]}))  # type: ignore[arg-type]
    described = [f"`method.{spec.name}` ({code(defaults_of(spec))}): {spec.metadata['meaning']}" for spec in specs]
    return " ".join(described)


def code(value: Any) -> str:
    """A value as it is written on the command line, in code font."""
    return f"`{compact(value)}`" if value != "" else ""


def compact(value: Any) -> str:
    """A value on one line: text as it is, everything else as JSON."""
    if value == "???":
        return "…"  # Hydra's mark for a value that the user must give
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def main(arguments: Sequence[str]) -> None:
    """Write the page to the path given, or to standard output."""
    page = reference_page()
    if arguments:
        Path(arguments[0]).write_text(page, encoding="utf-8")
    else:
        sys.stdout.write(page)


if __name__ == "__main__":
    main(sys.argv[1:])
