"""The card of a coreset as a data set of the Hugging Face Hub: what it is, how it was selected, under which licence."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from trim_lightning.console.visible import visible
from trim_lightning.records.licences import licences_of
from trim_lightning.records.record_file import RecordFile

# identifiers that the Hub knows; any other is `other` with a name
KNOWN = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0",
    "cc-by-nd-4.0", "odc-by", "odbl", "pddl", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "openrail", "llama2", "llama3",
    "gemma", "unlicense",
}  # fmt: skip
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
MORE = "n>1M"
FIELDS = ("license", "license_name", "license_link")  # of a card, about its licence


def card_text(
    name: str, manifest: Mapping[str, Any], records: RecordFile, files: Sequence[str], pool_card: Mapping[str, Any]
) -> str:
    """``README.md`` of the data set, as the Hub reads it.

    Args:
        name: What the data set is called on the Hub.
        manifest: That of the selection, as it may be shown to others.
        records: The coreset.
        files: Names of the data file and of the one with the scores.
        pool_card: What the pool's own card on the Hub says of its licence; empty if it has none.
    """
    stated = stated_licences(records)
    head: dict[str, Any] = {
        **licence_fields(stated, pool_card),
        "task_categories": ["text-generation"],
        "tags": ["trim-lightning", "coreset", "data-selection", "instruction-tuning"],
        "size_categories": [next((size for most, size in SIZES if len(records) < most), MORE)],
        "configs": [
            {"config_name": config, "data_files": file}
            for config, file in zip(("default", "scores"), files, strict=True)
        ],
    }  # fmt: skip
    if source := hub_pool(manifest):
        head["source_datasets"] = [source]
    table = "\n".join(f"| {name} | {plain(value)} |" for name, value in selected_how(manifest))
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"""\
---
{front}---

# {plain(name.rpartition("/")[2])}

{len(records):,} of {manifest["counts"]["pool"]:,} records of a pool, selected by TRIM Lightning
{plain(manifest["versions"].get("trim-lightning", ""))} as training data for what a few target examples show, best
first.

## How it was selected

| | |
| --- | --- |
{table}

`scores` holds row in the pool, id, score and rank of each record, line by line; `export.json` the checksums. What a
selection sees is similarity to the targets: nothing was checked for truth or safety.

## Licence

{licence_text(stated, pool_card)}
"""


def selected_how(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The lines of the card's table."""
    config, inputs, counts = manifest["config"], manifest["inputs"], manifest["counts"]
    method = config["method"]
    own = ", ".join(f"{key}={value}" for key, value in method.items() if key != "name")
    budget = {
        key: value for key in ("fraction", "count", "tokens") if (value := config["selection"].get(key)) is not None
    }
    lines = [("method", method["name"] + (f" ({own})" if own else ""))]
    if method["name"] in ("trim", "trim_plus"):
        lines += [("pooler", config["pooler"]["name"]), ("tokens that count", config["scope"])]
    if "model" in inputs:
        warmed = "warmup" in manifest["stages"]  # methods may leave the warm-up out
        lines.append(("scorer", inputs["model"]["name"] + (", warmed up" if warmed else "")))
    for role in ("pool", "target"):
        if role in inputs:
            found = inputs[role]
            lines.append((role, f"{found['name']}, {found['rows']:,} records, sha256 {found['sha256'][:16]}"))
    lines.append(("budget", ", ".join(f"{key} {value}" for key, value in budget.items()) or "5 % of the pool"))
    lines.append(("selected", f"{counts['selected']:,} records, {counts['selected_tokens']:,} content tokens"))
    return [*lines, ("seed", config["seed"])]


def hub_pool(manifest: Mapping[str, Any]) -> str | None:
    """Id of the Hub data set that the pool was, if the run noted one: ``pool=hub`` reads folders as well."""
    name = manifest["inputs"].get("pool", {}).get("hub")
    return name if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) else None


def stated_licences(records: RecordFile) -> Counter[str]:
    """The licences that records name themselves, and of how many; the empty text stands for none."""
    found = (licences_of(records.object(row)) for row in range(len(records)))
    return Counter(
        next((fields[name] for name in ("license", "licence", *fields) if name in fields), "") for fields in found
    )


def licence_fields(stated: Mapping[str, int], pool_card: Mapping[str, Any]) -> dict[str, Any]:
    """What the head of the card says of the licence: that of all records, else the pool's own, else nothing."""
    names = [name for name in stated if name]
    if not names:
        return {name: pool_card[name] for name in FIELDS if pool_card.get(name)}
    if len(stated) > 1:
        return {"license": "other", "license_name": "several"}
    identifier = re.sub(r"[^a-z0-9.]+", "-", names[0].lower()).strip("-")
    return {"license": identifier} if identifier in KNOWN else {"license": "other", "license_name": identifier or "own"}


def licence_text(stated: Mapping[str, int], pool_card: Mapping[str, Any]) -> str:
    """The card's paragraph on the licence."""
    of_pool = ", ".join(plain(pool_card[name]) for name in FIELDS if pool_card.get(name))
    lines = [f"- {plain(name) or 'none named'}: {number:,} records" for name, number in stated.items()]
    parts = []
    if any(stated):
        parts.append("The records name their own; it stands in a field of each:\n\n" + "\n".join(lines))
    if of_pool:
        parts.append(f"The card of the pool says: {of_pool}.")
    if not parts:
        parts.append("The records name none. The pool's own licence holds for them: look there before you share them.")
    return "\n\n".join(parts)


def plain(value: Any) -> str:
    """A value as text in Markdown, in which nothing of it means anything."""
    text = html.escape(visible(" ".join(str(value).split())), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)
