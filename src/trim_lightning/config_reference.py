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

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from trim_lightning.config import config_directory, register_schemas
from trim_lightning.methods.base import load_selector, method_names
from trim_lightning.settings import SelectSettings

ROOTS: Mapping[str, type] = {"select": SelectSettings}
"""Name of each command's file in ``conf/`` and its schema; a key of two commands is described with the first."""
COMMAND = "python -m trim_lightning.config_reference docs/configuration.md"
HEAD = f"""\
# Configuration

<!-- Written by `{COMMAND}`; do not edit. -->

Every key of `trim-select` (`python select.py`), its type, its default, what it may be, and what it means. Set a key
with `key=value`, pick an option of a group with `group=option`; a key that is not listed here is an error. The
default is what a run without overrides uses; `trim-select --cfg job` prints the keys of any command composed.

A list is written `'key=[a,b]'`, in quotes because of the shell; a field of a mapping is set by its name, as in
`pool.where.lang=en`; `null` means none. Overrides may have any order: a key given on the command line wins over the
option of its group. A value `${{…}}` is filled in when the run starts; `…` is a value that you must give.
"""

FREE = {
    "method": "`method.name` is the selector; other keys under `method` are its own, as the options below list them.",
    "trainer": "Arguments of `lightning.Trainer`, those that an option sets and others, as in "
    "`trainer.deterministic=true`. Callbacks, logger, checkpoints and the progress bar are the run's own; arguments "
    "that would change what is computed are refused, with the key to use in their place.",
}
"""Groups whose keys no schema lists, and what may stand there."""

TYPE_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def reference_page() -> str:
    """The whole page in Markdown."""
    parts, described = [HEAD], set(FREE)
    for name, schema in ROOTS.items():
        defaults = composed_defaults(name)
        fresh = [spec for spec in dataclasses.fields(schema) if spec.name not in described]
        described |= {spec.name for spec in fresh}
        single = [spec for spec in fresh if not dataclasses.is_dataclass(defaults_of(spec))]
        if single:
            parts.append(f"## Keys without a group\n\n{key_table(schema, single, defaults, '')}")
        parts += [group_section(spec, defaults) for spec in fresh if spec not in single]
    parts += [f"## {name}\n\n{text}\n\n{options_table(name)}" for name, text in FREE.items()]
    parts += [
        f"## {name}\n\nRecipes that set keys of several groups; none is on by default.\n\n{options_table(name)}"
        for name in ("experiment", "debug")
    ]
    return "\n".join(parts)


def defaults_of(spec: dataclasses.Field[Any]) -> Any:
    """The schema's default of one field."""
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def composed_defaults(root: str) -> dict[str, Any]:
    """The config of a run of one command without overrides, its interpolations as they are written."""
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        container = OmegaConf.to_container(compose(root), resolve=False)
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}


def group_section(spec: dataclasses.Field[Any], defaults: Mapping[str, Any]) -> str:
    """The section of one group: its keys, then the options that ``conf/`` has for it."""
    schema = type(defaults_of(spec))
    section = f"## {spec.name}\n\n{(schema.__doc__ or '').strip()}\n\n"
    section += key_table(schema, dataclasses.fields(schema), defaults[spec.name], f"{spec.name}.")
    options = options_table(spec.name)
    return section + (f"\n{options}" if options else "")


def key_table(schema: type, specs: Sequence[dataclasses.Field[Any]], defaults: Mapping[str, Any], prefix: str) -> str:
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
    return ", ".join(f"{sign} {compact(metadata[name])}" for name, sign in bounds if metadata[name] is not None)


def options_table(group: str) -> str:
    """The options of a group with what each sets; empty if ``conf/`` has no such folder."""
    chosen = default_options().get(group)
    rows = []
    for file in sorted((config_directory() / group).glob("*.yaml")):
        content = read_option(file)
        mark = " (default)" if file.stem == chosen else ""
        prefix = "" if "# @package _global_" in file.read_text(encoding="utf-8") else f"{group}."
        values = ", ".join(f"`{name}={compact(value)}`" for name, value in leaves(content, prefix))
        rows.append([f"`{group}={file.stem}`{mark}", values, note_of(file) + own_keys(group, content)])
    return table(["option", "sets", "note"], rows) if rows else ""


def default_options() -> dict[str, str]:
    """Group to the option that a command picks by itself; where two differ, the first one's."""
    entries = [
        entry for root in reversed(ROOTS) for entry in read_option(config_directory() / f"{root}.yaml")["defaults"]
    ]
    return {name: option for entry in entries if isinstance(entry, dict) for name, option in entry.items()}


def read_option(file: Path) -> dict[str, Any]:
    """The content of a config file, its interpolations as they are written."""
    container = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}


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
    """A value as it is written on the command line."""
    if value == "???":
        return "…"  # Hydra's mark for a value that the user must give
    if isinstance(value, list):
        return f"[{','.join(map(compact, value))}]"
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
