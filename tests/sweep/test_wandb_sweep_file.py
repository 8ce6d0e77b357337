"""The W&B sweep of `examples/` gives command lines that run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from composing import compose_train
from trim_lightning.pipeline.checks import check_training

FILE = Path(__file__).resolve().parents[2] / "examples" / "wandb_sweep.yaml"


def command_lines() -> list[list[str]]:
    """What W&B's agent would run, with the ends of every range and every value of the lists."""
    sweep = yaml.safe_load(FILE.read_text())
    choices = [
        parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"], 1.2e-05]
        for parameter in sweep["parameters"].values()
    ]
    longest = max(map(len, choices))
    lines = []
    for values in itertools.islice(zip(*map(itertools.cycle, choices), strict=True), longest):
        given: dict[str, Any] = dict(zip(sweep["parameters"], ({"value": value} for value in values), strict=True))
        arguments = create_sweep_command_args({"args": given})["args_no_hyphens"]
        line: list[str] = []
        for part in create_sweep_command(sweep["command"]):
            filled = {"${program}": [sweep["program"]], "${args_no_hyphens}": arguments}
            line += filled.get(part, [part])
        lines.append(line)
    return lines


@pytest.mark.parametrize("line", command_lines(), ids=" ".join)
def test_every_command_line_is_a_training_that_can_be_run(line: list[str]) -> None:
    program, *overrides = line
    assert program == "trim-train"
    settings = compose_train([*overrides, "paths.output_dir=out"])
    check_training(settings)
    assert settings.logger.name == "wandb"
    assert settings.evaluation.generated  # so that there is the metric that the sweep is steered by
    assert {f"{settings.saliency.num_layers}", settings.pooler.name} <= {text.partition("=")[2] for text in overrides}


def test_the_metric_is_one_that_a_training_logs() -> None:
    from trim_lightning.evaluation.evaluate import summarise
    from trim_lightning.settings.schema import EvaluationSettings

    metric = yaml.safe_load(FILE.read_text())["metric"]
    logged = summarise([{"num_tokens": 2, "nll_before": 4.0, "nll": 2.0}], EvaluationSettings())
    assert (metric["goal"], metric["name"] in logged) == ("minimize", True)
