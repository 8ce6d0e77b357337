"""What a user sees at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from trim_lightning.console.amounts import place_text
from trim_lightning.console.terminal import WIDTH, pairs_text, wrapped
from trim_lightning.console.visible import visible
from trim_lightning.records.file_search import names_of
from trim_lightning.records.kinds import count_kinds, kind_field
from trim_lightning.records.record_file import RecordFile
from trim_lightning.records.targets import TargetSet


def selection_metrics(manifest: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a manifest as flat ``group/name`` metrics."""
    metrics = {f"selection/{name}": value for name, value in manifest["counts"].items()}
    for stage, record in manifest["stages"].items():
        for name in ("seconds", "tokens", "tokens_per_second"):
            metrics[f"{stage}/{name}"] = record[name]
    return metrics


def trim_words(config: Mapping[str, Any]) -> str:
    """How TRIM scored: pooler and scope, and what of states and weights is not as usual."""
    next_token = config.get("fingerprint", {}).get("token_class") == "next"
    weight = config["pooler"].get("token_weight", "none")
    weights = [f"{name.removesuffix('_weight')} × {value:g}" for name, value in config["method"].items()
               if name.endswith("_weight") and value]  # fmt: skip
    return ", ".join([
        config["method"]["name"], *([" + ".join(weights)] if weights else []),
        *(["next-token classes"] if next_token else []), f"pooler {config['pooler']['name']}",
        *([f"tokens weighed by {weight}"] if weight != "none" else []), f"scope {config['scope']}",
    ])  # fmt: skip


def selection_summary(
    manifest: dict[str, Any],
    pool: RecordFile,
    targets: TargetSet | None,
    order: NDArray[np.int64],
    chosen: NDArray[np.int64],
    directory: Path,
    unscored: str = "",
) -> str:
    """The closing tables: what went in, what came out, what it cost, where it is."""
    counts, config = manifest["counts"], manifest["config"]
    method = config["method"]["name"]
    rows = [
        ["method", trim_words(config) if method in ("trim", "trim_plus") else method],
        ["scorer", manifest["inputs"]["model"]["name"]],
        ["pool", f"{counts['pool']:,} records ({pool.name})"],
        *([["files read", names_of(map(visible, pool.files))]] if pool.files else []),
        *([] if targets is None else [["targets", f"{len(targets.records)} examples ({targets.records.name})"]]),
        ["scored", f"{counts['scored']:,}" + (f", {counts['unscored']:,} not ({unscored})" if unscored else "")],
        *cascade(counts),
        *left_out(manifest),
        [
            "selected",
            f"{counts['selected']:,} records, {counts['selected_tokens']:,} content tokens, "
            f"{counts['selected_response_tokens']:,} of them in responses",
        ],
        [
            "mean length",
            f"{0 if counts['mean_tokens_selected'] is None else counts['mean_tokens_selected']} tokens in the coreset, "
            f"{counts['mean_tokens_pool']} in the pool",
        ],
    ]
    attention = manifest["stages"].get("fingerprint", {}).get("attention")
    if attention and attention["layers"]:
        rows.append(["attention", f"layers {', '.join(map(str, attention['layers']))}, from 0, of {attention['of']}"])
    if counts["truncated"]:
        whole = f", {counts['response_cut_off']:,} of them before their response" if counts["response_cut_off"] else ""
        rows.append(["truncated", f"{counts['truncated']:,} records at {counts['max_length']} tokens{whole}"])
    if counts["fallback_share"] is not None:
        rows.append(
            [
                "fallback",
                f"{counts['fallback_share']:.1%} of the scored tokens have no fingerprint of their own",
            ]
        )
    stages = [
        [
            name,
            f"{stage['seconds']:.1f}",
            f"{stage['tokens']:,}",
            f"{stage['tokens_per_second']:,.0f}" if stage["tokens"] else "",
            "from the store" if stage["cached"] else "",
        ]
        for name, stage in manifest["stages"].items()
    ]
    parts = [
        pairs_text(rows),
        tabulate(
            stages,
            headers=["stage", "seconds", "tokens", "tokens/s", ""],
            tablefmt="simple",
            disable_numparse=True,
            colalign=("left", "right", "right", "right", "left"),
        ),
    ]
    mix = describe_mix(pool, targets, chosen)
    if mix:
        parts.append(mix)
    parts += told_again(manifest)
    parts.append(f"files: {place_text(directory)}")
    return "\n\n".join(parts)


def cascade(counts: dict[str, Any]) -> list[list[str]]:
    """The line that says how many records got the full score, of a cascade."""
    if "scored_in_full" not in counts:
        return []
    expected, bound = counts["expected_recall"], counts["recall_bound"]
    told = f"{counts['scored_in_full']:,}; expected recall {expected:.3f}, at least {bound:.3f} (95 %)"
    return [["scored in full", told]]


def left_out(manifest: dict[str, Any]) -> list[list[str]]:
    """The lines that say why records have no score, and how many of the selected teach nothing."""
    counts, lines = manifest["counts"], []
    empty, cut = counts["no_response"] - counts["response_cut_off"], counts["response_cut_off"]
    if manifest["config"]["selection"]["require_response"]:
        reasons = {
            "without a response": empty,
            "with their response cut off": cut,
            "without a token in scope, or not rendered": counts["unscored"] - empty - cut,
        }
        if counts["no_response"]:
            lines.append(["left out", ", ".join(f"{number:,} {why}" for why, number in reasons.items() if number)])
    elif counts["selected_no_response"]:
        lines.append(["no response", f"{counts['selected_no_response']:,} of the selected records teach nothing"])
    return lines


def told_again(manifest: dict[str, Any]) -> list[str]:
    """The warnings once more: in a long run they have scrolled away."""
    told = [wrapped(visible(line), "- ", "  ") for line in manifest["warnings"]]
    return ["\n".join(["warnings:", *told])] if told else []


def training_summary(metrics: dict[str, Any], manifest: dict[str, Any], directory: Path) -> str:
    """The closing tables of a training: what was trained, and what it changed."""
    config, inputs = manifest["config"], manifest["inputs"]
    given = config["coreset"]["path"] is not None
    kept = f", the weights of epoch {metrics['train/epoch']} are kept" if "train/epoch" in metrics else ""
    steps, trained = metrics["train/steps"], metrics["train/trained_tokens"]
    rows = [
        ["method", "coreset given" if given else config["method"]["name"]],
        ["trainee", inputs["trainee"]["name"]],
        ["coreset", f"{inputs['coreset']['rows']:,} records"],
        ["training", f"{steps:,} steps over {trained:,} trained tokens, {metrics['train/seconds']:.1f} s{kept}"],
    ]
    if manifest["selection"] is not None:
        rows += left_out(manifest["selection"])
    taken = [name.removesuffix("_before") for name in metrics if name.startswith("eval/") and name.endswith("_before")]
    measured = [
        [
            name.removeprefix("eval/"),
            f"{metrics[f'{name}_before']:.4f}",
            f"{metrics[name]:.4f}",
            f"{metrics[f'{name}_low']:.4f} to {metrics[f'{name}_high']:.4f}" if f"{name}_low" in metrics else "",
        ]
        for name in taken
    ]
    parts = [pairs_text(rows)]
    if measured:
        headers = ["held-out", "before", "after", "95 % interval"]
        widths = [WIDTH - 38, None, None, None]  # a task's name may be long
        parts.append(tabulate(measured, headers=headers, tablefmt="simple", disable_numparse=True, maxcolwidths=widths))
    parts += told_again(manifest)
    parts.append(f"files: {place_text(directory)}")
    return "\n\n".join(parts)


def describe_mix(pool: RecordFile, targets: TargetSet | None, chosen: NDArray[np.int64]) -> str:
    """Which kinds of records the coreset holds against the pool, by the first kind-like field that records have."""
    if not len(chosen):
        return ""
    field = kind_field(pool.object(int(chosen[0])))
    if field is None:
        return ""
    selected = count_kinds(map(pool.object, chosen.tolist()), field)
    counted = pool.kinds.get(field)
    everything = count_kinds(map(pool.object, range(len(pool))), field) if counted is None else counted
    examples = [] if targets is None else [targets.records.object(row) for row in range(len(targets.records))]
    wanted = count_kinds(examples, field)
    lines = [
        [
            visible(kind) + (" (the targets' own)" if kind in wanted else ""),
            number,
            f"{number / len(chosen):.0%}",
            f"{everything[kind] / len(pool):.1%}",
        ]
        for kind, number in selected.most_common(8)
    ]
    table = tabulate(
        lines, headers=[field, "selected", "of coreset", "of pool"], tablefmt="simple",
        maxcolwidths=[WIDTH - 31, None, None, None],
    )  # fmt: skip
    rest = len(selected) - len(lines)
    return table + (f"\nand {rest} more" if rest > 0 else "")
