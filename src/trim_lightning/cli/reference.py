"""Write the page of every configuration key from the schemas and ``conf/``, so that it cannot drift from them.

    python -m trim_lightning.cli.reference docs/configuration.md

Without a path the page goes to standard output.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trim_lightning.files.json_files import dotted
from trim_lightning.methods.base import load_selector, method_names
from trim_lightning.settings.compose import SCHEMAS, composed, config_directory
from trim_lightning.settings.mistakes import RECIPES as RECIPE_GROUPS

COMMAND = "python -m trim_lightning.cli.reference docs/configuration.md"
HEAD = f"""\
# Configuration

<!-- Written by `{COMMAND}`; do not edit. -->

Every key of `trim-select` (`python select.py`) and `trim-train` (`python train.py`), its type, its default, what it
may be, and what it means. Set a key with `key=value`, pick an option of a group with `group=option`; a key that is
not listed here is an error, and most that a run does not read (`pooler.k` without its pooler, `saliency` with another
method) are said at its start, but not in a multirun, whose jobs share their keys. The default is what a run without
overrides uses; `--cfg job` prints the keys of a command with its overrides in place.

A list is written `'key=[a,b]'`, in quotes because of the shell; a field of a mapping is set by its name, as in
`pool.where.lang=en`; `null` means none. Overrides may have any order: a key given on the command line wins over the
option of its group. A value `${{…}}` is filled in when the run starts; `…` is a value that you must give.
"""

METHOD = "`method.name` is the selector; each has keys of its own beside it."
TRAINER = """\
Arguments of `lightning.Trainer`, those that an option sets and others, as in `trainer.deterministic=true`. Callbacks,
logger, checkpoints and the progress bar are the run's own; arguments that would change what is computed are refused,
with the key to use in their place."""
KEY_HEAD = ("key", "type", "default", "permitted", "meaning")
RECIPES = "Recipes that set keys of several groups; none is on by default."
TYPE_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "text or list of text"}


def reference_page() -> str:
    """The whole page in Markdown; a key of two commands is described with the first."""
    parts, described = [HEAD], {"method", "trainer"}
    for place, (name, schema) in enumerate(SCHEMAS.items()):
        defaults = as_written(composed(name))
        fresh = [spec for spec in dataclasses.fields(schema) if spec.name not in described]
        described |= {spec.name for spec in fresh}
        single = [spec for spec in fresh if not dataclasses.is_dataclass(defaults_of(spec))]
        if single:
            parts.append(f"## Keys without a group\n\n{table(KEY_HEAD, key_rows(schema, single, defaults, ''))}")
        only = f"For `trim-{name}` only. " if place else ""
        parts += [group_section(spec, defaults, only) for spec in fresh if spec not in single]
    parts.append(f"## method\n\n{METHOD}\n\n{options_table('method')}\n{method_keys()}")
    parts.append(f"## trainer\n\n{TRAINER}\n\n{options_table('trainer')}")
    parts += [f"## {name}\n\n{RECIPES}\n\n{options_table(name)}" for name in RECIPE_GROUPS]
    return "\n".join(parts)


def defaults_of(spec: dataclasses.Field[Any]) -> Any:
    """The schema's default of one field."""
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def group_section(spec: dataclasses.Field[Any], defaults: Mapping[str, Any], only: str) -> str:
    """The section of one group: whose it is, its keys, then the options that ``conf/`` has for it."""
    schema = type(defaults_of(spec))
    section = f"## {spec.name}\n\n{only}{(schema.__doc__ or '').strip()}\n\n"
    section += table(KEY_HEAD, key_rows(schema, dataclasses.fields(schema), defaults[spec.name], f"{spec.name}."))
    options = options_table(spec.name)
    return section + (f"\n{options}" if options else "")


def key_rows(
    schema: type, specs: Sequence[dataclasses.Field[Any]], defaults: Mapping[str, Any], prefix: str
) -> list[list[str]]:
    """A table row for each of some fields of a settings class, and of the classes within it."""
    hints, rows = typing.get_type_hints(schema), []
    for spec in specs:
        name, default = f"{prefix}{spec.name}", defaults[spec.name]
        if dataclasses.is_dataclass(hints[spec.name]):
            rows += key_rows(hints[spec.name], dataclasses.fields(hints[spec.name]), default, f"{name}.")
            continue
        meaning = spec.metadata["meaning"].replace("<", "&lt;")
        rows.append([f"`{name}`", type_name(hints[spec.name]), code(default), permitted(spec.metadata), meaning])
    return rows


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
        return ", ".join([code(choice) for choice in metadata["choices"]] + ["names"] * metadata["names"])
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
        bases = list(base_options(content.pop("defaults", [])))
        axes = pop_axes(content)
        set_keys = [f"`{name}={compact(value)}`" for name, value in dotted(content, prefix)]
        values = ", ".join([*bases, *set_keys])
        if axes:
            swept = f"sweeps {' × '.join(axes)}"
            values = f"{values}; {swept}" if values else swept
        rows.append([f"`{group}={file.stem}`{mark}", values, note_of(file)])
    return table(["option", "sets", "note"], rows) if rows else ""


def default_options() -> dict[str, str]:
    """Group to the option that a command picks by itself; where two differ, the first one's."""
    entries = [
        entry for root in reversed(SCHEMAS) for entry in read_option(config_directory() / f"{root}.yaml")["defaults"]
    ]
    return {name: option for entry in entries if isinstance(entry, dict) for name, option in entry.items()}


def read_option(file: Path) -> dict[str, Any]:
    """The content of a config file."""
    return as_written(OmegaConf.load(file))


def as_written(config: Any) -> dict[str, Any]:
    """A config as plain values, its interpolations as they are written."""
    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}


def base_options(defaults: Sequence[Any]) -> Iterator[str]:
    """The options that a recipe builds on, as its defaults list names them."""
    for entry in defaults:
        if isinstance(entry, dict):
            yield from (f"`{name.removeprefix('override ').lstrip('/')}={option}`" for name, option in entry.items())
        elif entry != "_self_":
            yield f"all that `{entry}` sets"


def pop_axes(content: dict[str, Any]) -> list[str]:
    """Take the axes of a sweep out of a recipe's content, each as it would be written behind ``-m``."""
    hydra = content.get("hydra", {})
    if hydra.pop("mode", None) != "MULTIRUN":
        return []
    params = hydra.get("sweeper", {}).pop("params", {})
    return [f"`{name}={compact(value)}`" for name, value in params.items()]


def note_of(file: Path) -> str:
    """The comment at the head of a config file."""
    head = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in head if "@package" not in line)


def method_keys() -> str:
    """A table of the keys that the methods have of their own."""
    rows = []
    for name in method_names():
        schema = type(load_selector({"name": name}))
        specs = dataclasses.fields(schema)  # type: ignore[arg-type]
        defaults = {spec.name: defaults_of(spec) for spec in specs}
        rows += [[f"`{name}`", *row] for row in key_rows(schema, specs, defaults, "method.")]
    return table(["method", *KEY_HEAD], rows)


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
