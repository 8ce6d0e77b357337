"""What each group of records teaches: the same LoRA trained on each, the drop of every task's held-out loss.

One training is one small file, so a killed run goes on with what is missing, and several processes can share the work.
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import materials
from trim_lightning.engine.response_loss import mean_response_loss
from trim_lightning.files.atomic import write_text
from trim_lightning.models.load import load_model
from trim_lightning.models.precision import resolve_dtype
from trim_lightning.settings.schema import TuningSettings
from trim_lightning.tokens.tokenized import TokenizedRecords
from trim_lightning.tuning.run import TrainingSite, train_model
from value_groups import TASKS, Group

STEPS = 16  # of every training, however many records have the group's tokens
LEARNING_RATE = 5e-4
FEWEST = 20  # trainings that are gathered
TWICE = 3  # every so many groups are trained with a second seed, for the noise ceiling
EVALUATION_TOKENS = 4_096
TRAINING = {"steps": STEPS, "learning rate": LEARNING_RATE}  # gains of other trainings are other gains


def tokenized(path: Path) -> TokenizedRecords:
    """A JSONL file's records as SmolLM2's tokens, made once beside it."""
    directory = path.with_suffix(".tokens")
    if not (directory / "done").exists():
        directory.mkdir(exist_ok=True)
        materials.tokens_of_file(materials.smollm2(), path, directory)
        (directory / "done").touch()
    return TokenizedRecords(directory)


def wanted(groups: Sequence[Group]) -> list[tuple[Group, int]]:
    """Trainings in the order in which they are done: all groups once, every third again with a second seed.

    Groups come in a drawn order and a second seed right after the first, so that what there is when half is done is a
    fair sample of the whole.
    """
    twice = {group.name for group in groups[::TWICE]}
    return [(group, seed) for group in in_drawn_order(groups) for seed in ((0, 1) if group.name in twice else (0,))]


def in_drawn_order(groups: Sequence[Group]) -> list[Group]:
    """The groups in the order in which they are trained on."""
    return [groups[place] for place in np.random.default_rng(20).permutation(len(groups))]


def measure(folder: Path, groups: Sequence[Group], part: int, parts: int) -> None:
    """Do the trainings that are not there yet; of several processes each takes its part.

    Args:
        folder: With the inputs of `write_inputs`; results go to ``runs/`` in it.
        groups: What to train on.
        part: Which part of the missing trainings this process takes, from 0.
        parts: How many there are.
    """
    train_groups(folder, wanted(groups)[part::parts])


def losses_before(folder: Path) -> dict[str, float]:
    """Each task's held-out loss of the untrained model, measured once on this machine."""
    file = folder / "runs" / "before.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        held_out = {task: tokenized(folder / f"held_out.{task}.jsonl") for task in TASKS}
        write_text(json.dumps(losses(load_model(materials.smollm2(), resolve_dtype("auto")), held_out)), file)
    found: dict[str, float] = json.loads(file.read_text())
    return found


def train_groups(folder: Path, trainings: Sequence[tuple[Group, int]]) -> None:
    """Do those of some trainings, each a group with a seed, that are not there yet."""
    losses_before(folder)
    pool = tokenized(folder / "pool.jsonl")
    held_out = {task: tokenized(folder / f"held_out.{task}.jsonl") for task in TASKS}
    dtype = resolve_dtype("auto")
    for group, seed in trainings:
        file = folder / "runs" / f"{group.name}.{seed}.json"
        if file.exists():
            continue
        settings = TuningSettings(
            epochs=1, learning_rate=LEARNING_RATE, warmup_ratio=0.1, batch_size=math.ceil(len(group.rows) / STEPS)
        )
        with tempfile.TemporaryDirectory(dir=folder) as directory:
            site = TrainingSite(Path(directory), {"accelerator": "cpu", "devices": 1}, file.stem)
            trained, facts = train_model(
                load_model(materials.smollm2(), dtype), pool, group.rows, settings, site, seed=seed
            )
            found = losses(trained.get_base_model(), held_out)
        del trained  # before the next model is loaded
        gc.collect()  # Lightning's trainer and its module hold each other
        write_text(json.dumps({"losses": found, "steps": facts["steps"], "trained": facts["trained_tokens"]}), file)


def losses(model: Any, held_out: Mapping[str, TokenizedRecords]) -> dict[str, float]:
    """Nats per response token of each task's held-out records."""
    return {task: mean_response_loss(model, records, EVALUATION_TOKENS) for task, records in held_out.items()}


@dataclass(frozen=True)
class Gains:
    """What groups teach tasks.

    Attributes:
        names: Of the groups.
        tasks: Of the tasks.
        first: ``[groups, tasks]`` drop of the held-out loss in nats per response token, with the first seed.
        second: The same with the second seed; both are NaN where there was no training.
    """

    names: tuple[str, ...]
    tasks: tuple[str, ...]
    first: NDArray[np.float64]
    second: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """``[groups, tasks]`` the mean over the seeds that there are."""
        return np.where(np.isnan(self.second), self.first, (self.first + self.second) / 2)

    @property
    def measured(self) -> NDArray[np.int64]:
        """Places of the groups that were trained on."""
        return np.flatnonzero(~np.isnan(self.first).any(1))

    def take(self, places: NDArray[np.int64]) -> Gains:
        """Those of some groups."""
        return Gains(tuple(self.names[place] for place in places), self.tasks, self.first[places], self.second[places])

    @classmethod
    def read(cls, path: Path) -> Gains:
        """Read the small file that is kept with the project."""
        content = json.loads(path.read_text())
        tables = [
            np.array([[math.nan if value is None else value for value in row] for row in content[name]])
            for name in ("first", "second")
        ]
        return cls(tuple(content["names"]), tuple(content["tasks"]), *tables)


def restore(folder: Path, groups: Sequence[Group], path: Path) -> None:
    """Lay the kept gains in place of trainings where there are none: another machine goes on with the rest.

    A gain stays what it was: it is taken off the loss that this machine has before a training.

    Raises:
        SystemExit: if they are of other groups or another kind of training.
    """
    if not path.exists():
        return
    content = json.loads(path.read_text())
    if content["names"] != [group.name for group in groups] or content.get("training", TRAINING) != TRAINING:
        raise SystemExit(f"error: {path} holds gains of other groups or trainings; move it away to begin anew")
    before = losses_before(folder)
    for seed, table in enumerate((content["first"], content["second"])):
        for group, gains in zip(groups, table, strict=True):
            file = folder / "runs" / f"{group.name}.{seed}.json"
            if None not in gains and not file.exists():
                after = {task: before[task] - gain for task, gain in zip(content["tasks"], gains, strict=True)}
                write_text(json.dumps({"losses": after, "machine": content["machine"]}), file)


def gain_of(folder: Path, group: Group, seed: int) -> dict[str, float] | None:
    """What one training taught each task, rounded as it is kept; None for one that is not done."""
    file = folder / "runs" / f"{group.name}.{seed}.json"
    if not file.exists():
        return None
    before = json.loads((folder / "runs" / "before.json").read_text())
    after = json.loads(file.read_text())["losses"]
    return {task: round(loss - after[task], 6) for task, loss in before.items()}


def collect(folder: Path, groups: Sequence[Group], path: Path) -> None:
    """Gather the trainings that there are into one small file; a group without one is NaN.

    Raises:
        SystemExit: if there are too few to tell anything.
    """
    before = losses_before(folder)
    there = [(folder / "runs" / f"{group.name}.{seed}.json").exists() for group, seed in wanted(groups)]
    print(f"{sum(there)} of {len(there)} trainings are done")
    if sum(there) < FEWEST:
        raise SystemExit(f"error: {FEWEST} trainings are the fewest that are worth a table; run `train` again")

    def row(group: Group, seed: int) -> list[float | None]:
        found = gain_of(folder, group, seed)
        return [None if found is None else found[task] for task in TASKS]

    files = [folder / "runs" / f"{group.name}.{seed}.json" for group, seed in wanted(groups)]
    machines = [json.loads(file.read_text()).get("machine", materials.machine()) for file in files if file.exists()]
    content = {
        "made by": "make value ARGS='train collect'",
        "machine": materials.machine() if materials.machine() in machines else machines[0],
        "machines": len({json.dumps(machine, sort_keys=True) for machine in machines}),
        "training": TRAINING,
        "unit": "drop of the held-out loss, nats per response token",
        "before": {task: round(value, 6) for task, value in before.items()},
        "tasks": TASKS,
        "names": [group.name for group in groups],
        "first": [row(group, 0) for group in groups],
        "second": [row(group, 1) for group in groups],
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    write_text("{\n" + ",\n".join(lines) + "\n}\n", path)
