"""``make results PAGE=name``: run an experiment's commands and write its page from the run directories.

An experiment is a file ``experiments/<name>.yaml``: title, question, data, commands, metrics, finding. What is done
already is not run again: delete ``build/results/<name>`` to start anew, or a command's folder in it after a change of
that command. ``--write`` only writes the page anew.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from scipy import stats
from tabulate import tabulate

import materials
import readme
from page_pictures import dots
from trim_lightning.api import load
from trim_lightning.compare.between_runs import ENOUGH_RUNS
from trim_lightning.compare.differences import Comparison
from trim_lightning.compare.groups import Group
from trim_lightning.compare.measures import lower_is_better
from trim_lightning.compare.report import Report, compare
from trim_lightning.compare.tables import bounds_text
from trim_lightning.report.page import token_text
from trim_lightning.report.token_texts import read_token_texts
from trim_lightning.report.token_views import heaviest, read_banks
from trim_lightning.runs.names import BANKS
from trim_lightning.runs.run import Run, text_of

ROOT = Path(__file__).resolve().parents[1]
RUNS, PAGES, SPECS = ROOT / "build" / "results", ROOT / "docs" / "results", Path(__file__).with_name("experiments")
DATA = "TRIM_DATA_DIR"
HALF = "$HALF_OF_SMOLLM2"  # in a command: the folder of `materials.half_smollm2`
SAMPLES = 10_000


@dataclass(frozen=True)
class Part:
    """One command of an experiment.

    Attributes:
        name: Folder of its runs.
        command: ``trim-select`` or ``trim-train`` and its overrides; ``$COMMON`` stands for the shared ones.
    """

    name: str
    command: str


@dataclass(frozen=True)
class Experiment:
    """What a page is made from.

    Attributes:
        name: Of the page.
        title: Its heading.
        question: What is asked, and why.
        data: Pool, targets, held-out records, models.
        parts: The commands.
        common: Overrides that the commands share.
        metrics: Columns: metrics of training runs, or facts of selections (`facts_of`).
        axes: Config keys that name a line, beside the method.
        usual: Values of axes that go without saying.
        finding: What it shows.
        picture: Metric that is drawn; the first one if it is not named.
        overlap: Add what each coreset shares with that of the first line.
        classes: List so many of the heaviest token classes of each line.
        diversity: Add how varied the records of each coreset are, by words and by SmolLM2's embeddings.
        cold: Every command has a store of its own, so that nothing is found in it but the converted model.
    """

    name: str
    title: str
    question: str
    data: str
    parts: Sequence[Part]
    common: str = ""
    metrics: Sequence[str] = ()
    axes: Sequence[str] = ()
    usual: Mapping[str, Any] = field(default_factory=dict)
    finding: str = ""
    picture: str | None = None
    overlap: bool = False
    classes: int = 0
    diversity: bool = False
    cold: bool = False

    @classmethod
    def read(cls, name: str) -> Experiment:
        """Read its file."""
        content = yaml.safe_load((SPECS / f"{name}.yaml").read_text())
        parts = [Part(label, " ".join(command.split())) for label, command in content.pop("runs").items()]
        content["common"] = " ".join(content.get("common", "").split())
        return cls(name=name, parts=parts, **content)

    def words(self, part: Part) -> list[str]:
        """The command line of a part."""
        return shlex.split(part.command.replace("$COMMON", self.common))

    def folder(self, part: Part) -> Path:
        """Where the runs of a part are."""
        return RUNS / self.name / part.name


def run(experiment: Experiment) -> None:
    """Run what is not there yet, over one store for all experiments."""
    if DATA not in os.environ:
        sys.exit(f"error: {DATA} is not set; it names the folder with pool.jsonl.gz and the targets")
    for part in experiment.parts:
        folder = experiment.folder(part)
        if (folder / "done").exists():
            if done(folder).get("command", shown(experiment, part)) != shown(experiment, part):
                sys.exit(f"error: {folder} is of another command than {experiment.name}.yaml now names; delete it")
            continue
        program, *overrides = experiment.words(part)
        overrides = [word.replace(f"${DATA}", os.environ[DATA]) for word in overrides]
        if any(HALF in word for word in overrides):
            overrides = [word.replace(HALF, str(materials.half_smollm2())) for word in overrides]
        store = cold_store(experiment, part) if experiment.cold else RUNS / "store"
        flags = [word for word in overrides if word == "-m"]
        command = [
            str(Path(sys.executable).with_name(program)), *flags, f"paths.store_dir={store}",
            f"hydra.sweep.dir={folder}", f"hydra.run.dir={folder}", *(word for word in overrides if word != "-m"),
        ]  # fmt: skip
        print(f"{experiment.name}: {part.command}", file=sys.stderr, flush=True)
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)  # not subprocess.run: the memory of this child alone is wanted
        if status:
            sys.exit(f"error: {experiment.name}/{part.name} failed; the reason is above")
        facts = {"peak_gib": used.ru_maxrss / 2**20, "store_mb": stored(store), "command": shown(experiment, part)}
        (folder / "done").write_text(json.dumps(facts))


def done(folder: Path) -> dict[str, Any]:
    """What `run` noted when a command had ended well; older notes name no command, the oldest are empty."""
    return dict(json.loads((folder / "done").read_text() or "{}"))


def stored(store: Path) -> float:
    """Megabytes of a store without the converted model."""
    stages = [stage for stage in store.iterdir() if stage.is_dir() and stage.name != "model"]
    return sum(path.stat().st_size for stage in stages for path in stage.rglob("*") if path.is_file()) / 1e6


def cold_store(experiment: Experiment, part: Part) -> Path:
    """A new store that has the converted model of the common one, if there is one."""
    store = RUNS / "cold" / experiment.name / part.name
    shutil.rmtree(store, ignore_errors=True)
    if (RUNS / "store" / "model").exists():
        shutil.copytree(RUNS / "store" / "model", store / "model")
    return store


def write(experiment: Experiment) -> Path:
    """Write the page and its picture."""
    folders = [experiment.folder(part) for part in experiment.parts if experiment.folder(part).exists()]
    embed = load(store_dir=RUNS / "store").embed if experiment.diversity else None
    report = compare(folders, all_pairs=False, samples=SAMPLES, seed=0, embed=embed)
    PAGES.mkdir(parents=True, exist_ok=True)
    parts = [f"# {experiment.title}", experiment.question.strip(), "## Data and commands", experiment.data.strip()]
    lines = [shown(experiment, part) for part in experiment.parts]
    parts.append("```bash\n" + "\n".join(lines) + "\n```")
    parts += ["## Results", summary_table(experiment, report)]
    drawn = experiment.picture or (experiment.metrics[0] if experiment.metrics else None)
    if drawn:
        values = {label_of(experiment, group): numbers(group, drawn) for group in report.groups}
        values = {label: found for label, found in values.items() if found}
        if values:
            (PAGES / f"{experiment.name}.svg").write_text(dots(values, heading(drawn)))
            words = "; ".join(f"{label} {sum(found) / len(found):.3g}" for label, found in values.items())
            parts.append(f"![{heading(drawn)}: {words}]({experiment.name}.svg)")
    if report.comparisons:
        parts += ["Against random (95 % interval over runs and held-out records; a verdict, corrected for the tests of "
                  f"a metric, takes {ENOUGH_RUNS} runs of either: [how](../comparing.md#differences)):",
                  difference_table(experiment, report)]  # fmt: skip
    if experiment.diversity:
        parts += ["How varied the records of each coreset are ([columns](../comparing.md#records-of-the-coresets); "
                  "effective records by SmolLM2-135M's embeddings; the first run of each line):",
                  diversity_table(experiment, report)]  # fmt: skip
    if experiment.classes:
        parts += ["The heaviest token classes of each bank, by summed saliency (`␣` is a blank, `↵` a line break):",
                  class_table(experiment, report)]  # fmt: skip
    if experiment.finding:
        parts += ["## What it shows", experiment.finding.strip()]
    parts.append(f"Written by `make results PAGE={experiment.name}` from {len(report.runs)} runs.")
    path = PAGES / f"{experiment.name}.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def shown(experiment: Experiment, part: Part) -> str:
    """A command as a reader types it."""
    return " ".join(experiment.words(part))


def summary_table(experiment: Experiment, report: Report) -> str:
    """One line a group: what it is, what it selected, its metrics over the seeds."""
    headers = ["run", "seeds", "records", "content tokens", *map(heading, experiment.metrics)]
    rows = []
    for group in report.groups:
        tokens = "" if group.tokens is None else f"{group.tokens:,.0f}"
        cells = [interval(numbers(group, metric)) for metric in experiment.metrics]
        line = [label_of(experiment, group), len(group.runs), f"{group.records:,.0f}", tokens, *cells]
        if experiment.overlap:
            shared = report.overlaps[0][report.runs.index(group.first)]
            line.append("" if shared is None else f"{shared:.2f}")
        rows.append(line)
    if experiment.overlap:
        headers.append("overlap with the first line")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def difference_table(experiment: Experiment, report: Report) -> str:
    """The tests between groups, as `trim-compare` makes them."""
    rows = [
        [label_of(experiment, item.first), heading(item.metric), f"{item.difference:+.4f}",
         bounds_text(item.low, item.high), "/".join(map(str, item.runs)), verdict(item), ahead_of(item)]
        for item in report.comparisons
    ]  # fmt: skip
    headers = ["run", "metric", "difference", "interval", "runs", "against random", "single random runs behind"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def verdict(item: Comparison) -> str:
    """The test's verdict, or why there is none."""
    found = item.verdict or item.untested
    return f"**{found}**" if found in ("better", "worse") else found


def ahead_of(item: Comparison) -> str:
    """How many of the baseline's runs the group's mean is ahead of: a count, no test."""
    sign = -1 if lower_is_better(item.metric) else 1
    own, others = numbers(item.first, item.metric), numbers(item.second, item.metric)
    mean = sum(own) / len(own)
    return f"{sum(sign * mean > sign * other for other in others)} of {len(others)}"


def diversity_table(experiment: Experiment, report: Report) -> str:
    """Lexical diversity and diversity by embeddings of each group's first coreset."""
    names = (
        "median_words",
        "response_share",
        "distinct_bigrams",
        "compression",
        "near_duplicates",
        "effective_records",
    )
    rows = []
    for group in report.groups:
        found = report.diversities[report.runs.index(group.first)]
        if found is not None:
            values = [getattr(found, name) for name in names]
            rows.append([label_of(experiment, group), *("" if value is None else f"{value:.2f}" for value in values)])
    headers = ["run", "median words", "of them response", "distinct pairs", "compression", "near duplicates",
               "effective records"]  # fmt: skip
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def class_table(experiment: Experiment, report: Report) -> str:
    """The heaviest fingerprints of each group's first run."""
    texts = read_token_texts(materials.smollm2().directory / "tokenizer.json")
    rows = []
    for group in report.groups:
        banks, _ = read_banks(group.first.directory / BANKS)
        found = heaviest(banks, texts, experiment.classes)
        total = sum(float(bank.mass.sum()) for bank in banks.values())
        words = " ".join(f"<code>{html.escape(token_text(item.text)).replace('|', '&#124;')}</code>" for item in found)
        rows.append([label_of(experiment, group), f"{sum(item.mass for item in found) / total:.0%}", words])
    headers = ["run", "their share of all saliency", "token classes"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def label_of(experiment: Experiment, group: Group) -> str:
    """What a line is called: the method and the keys that vary."""
    values = {axis: group.settings.get(axis) for axis in experiment.axes if axis != "method"}
    told = [axis for axis in values if axis not in experiment.usual or values[axis] != experiment.usual[axis]]
    shown_axes = [f"{axis}={axis_text(axis, values[axis])}" for axis in told]
    method = [group.method] if not shown_axes or "method" in experiment.axes else []
    return " ".join([*method, *shown_axes])


def axis_text(axis: str, value: Any) -> str:
    """A setting's value; of a path its last part, as the others are this machine's."""
    return text_of(value).rpartition("/")[2] if axis.endswith(".path") else text_of(value)


def numbers(group: Group, metric: str) -> list[float]:
    """A metric's value of each run that has it."""
    found = [run.measurements[metric].value if metric in run.measurements else facts_of(run).get(metric)
             for run in group.runs]  # fmt: skip
    return [float(value) for value in found if value is not None]


def facts_of(run: Run) -> dict[str, float | None]:
    """Numbers of a run that no metric holds: its selection's counts, costs, and tokens trained on."""
    folder = run.directory / "selection" if (run.directory / "selection").exists() else run.directory
    noted = next((parent for parent in (run.directory, *run.directory.parents) if (parent / "done").exists()), None)
    process = {} if noted is None else {name: value for name, value in done(noted).items() if name != "command"}
    manifest = json.loads((folder / "manifest.json").read_text())
    counts, stages = manifest["counts"], manifest["stages"]
    return {
        **{name: counts.get(name) for name in COUNTS},
        "labelled_tokens": run.labelled_tokens,
        **process,
        "selection_seconds": sum(stage["seconds"] for stage in stages.values()),
        **{f"{name}_seconds": stage["seconds"] for name, stage in stages.items()},
        "model_tokens": sum(stage["tokens"] for name, stage in stages.items() if name != "tokenize"),
        **shares(folder / "coreset.jsonl"),
    }


def shares(path: Path) -> dict[str, float | None]:
    """Share of the coreset's records in each category, and of its largest source."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = Counter(record.get("category") for record in records)
    sources = Counter(record.get("source") for record in records)
    result: dict[str, float | None] = {f"share_{kind}": count / len(records) for kind, count in kinds.items()}
    for kind in ("cot_math", "cot_commonsense", "mcq"):
        result.setdefault(f"share_{kind}", 0.0)
    result["largest_source"] = sources.most_common(1)[0][1] / len(records) if records else None
    result["sources"] = float(len(sources))
    return result


COUNTS = ("fallback_share", "bank_coverage", "mean_tokens_selected", "within_over_between")
HEADINGS = {
    "nll": "held-out loss", "nll_drop": "drop of held-out loss", "exact_match": "exact match",
    "option_accuracy": "option accuracy", "fallback_share": "fallback share", "bank_coverage": "bank coverage",
    "mean_tokens_selected": "mean length", "labelled_tokens": "response tokens trained",
    "selection_seconds": "selection, s", "warmup_seconds": "warm-up, s", "fingerprint_seconds": "target pass, s",
    "score_seconds": "scoring, s", "model_tokens": "tokens fed in selection",
    "share_cot_math": "share of mathematics", "share_cot_commonsense": "share of commonsense",
    "within_over_between": "collapse", "peak_gib": "peak memory, GiB", "store_mb": "in the store, MB",
    "share_mcq": "share of multiple choice",
    "largest_source": "share of the largest source", "sources": "sources",
}  # fmt: skip


def heading(metric: str) -> str:
    """A metric in words."""
    return HEADINGS.get(metric, metric)


def interval(values: Sequence[float]) -> str:
    """Mean of some runs, with the 95 % t-interval of the mean if there are at least three."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    digits = 0 if abs(mean) >= 100 else 4 if abs(mean) < 1 else 1
    if not any(values):
        return "0"
    if len(values) < 3 or max(values) == min(values):
        return f"{mean:,.{digits}f}"
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return f"{mean:,.{digits}f} ± {half:,.{digits}f}"


def main() -> int:
    """Parse and go."""
    names = sorted(file.stem for file in SPECS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", choices=[*names, []], metavar="PAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--write", action="store_true", help="run nothing, write the pages of what is there")
    options = parser.parse_args()
    for name in options.pages or names:
        experiment = Experiment.read(name)
        if not options.write:
            run(experiment)
        if any(experiment.folder(part).exists() for part in experiment.parts):
            print(write(experiment).relative_to(ROOT))
    return readme.main()


if __name__ == "__main__":
    sys.exit(main())
