"""Checks of settings that depend on each other, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from trim_lightning.errors import UserError
from trim_lightning.settings.key import check
from trim_lightning.settings.schema import CascadeSettings, SelectSettings, TrainSettings
from trim_lightning.store.processes import launched_size


def check_settings(settings: SelectSettings) -> None:
    """Check every key by itself and those that depend on each other, before anything is read.

    Raises:
        UserError: naming the keys.
    """
    check(settings)
    check_quantize(settings)
    for name, source in (("pool", settings.pool), ("target", settings.target)):
        if source.path is not None and source.source in ("generated", "from_pool"):
            raise UserError(
                f"{name}.path={source.path}: {name}={source.source} reads no file; add {name}=file (or hub)"
            )
    if settings.target.single_groups and settings.target.group_field is not None:
        raise UserError(
            f"target.single_groups=true and target.group_field={settings.target.group_field}: two ways to make groups; "
            "give one of them"
        )
    selection = settings.selection
    budgets = {name: getattr(selection, name) for name in ("fraction", "count", "tokens")}
    given = [f"selection.{name}={value}" for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: two budgets at once; give one of them")
    if selection.token_scope != "all" and selection.tokens is None:
        raise UserError(
            f"selection.token_scope={selection.token_scope}: there is no budget in tokens; give selection.tokens too"
        )
    if (selection.cap is None) != (selection.cap_field is None):
        raise UserError("selection.cap and selection.cap_field go together; give both or neither")
    low, high = selection.min_tokens, selection.max_tokens
    if low is not None and high is not None and low > high:
        raise UserError(f"selection.min_tokens={low} is above selection.max_tokens={high}")
    check_cascade(settings)


def check_cascade(settings: SelectSettings) -> None:
    """Check the keys of a cascade among themselves and against the method.

    Raises:
        UserError: naming the keys.
    """
    cascade, method = settings.scoring.cascade, settings.method.get("name")
    given = [f"scoring.cascade.{name}={value}" for name, value in asdict(cascade).items()
             if value != getattr(CascadeSettings(), name)]  # fmt: skip
    if settings.scoring.name != "cascade":
        if given:
            raise UserError(f"{given[0]}: there is no cascade; add scoring=cascade")
        return
    if method != "trim":
        raise UserError(f"scoring=cascade: method={method} has no cheap score; use method=trim, or scoring=plain")
    kinds = [line for line in given if line.partition("=")[0].rpartition(".")[2] in ("layers", "model", "by")]
    if len(kinds) > 1:
        raise UserError(f"{' and '.join(kinds)}: several cheap scores at once; give one of them")
    if cascade.keep is not None and cascade.recall != CascadeSettings().recall:
        raise UserError(
            f"scoring.cascade.keep={cascade.keep} and scoring.cascade.recall={cascade.recall}: the one leaves nothing "
            "to the other; give one of them"
        )


def check_quantize(settings: SelectSettings) -> None:
    """Refuse what does not go with quantised weights.

    Raises:
        UserError: naming what is in the way.
    """
    bits = settings.model.quantize
    if bits is None:
        return
    if settings.trainer.get("strategy") == "fsdp":
        raise UserError(
            f"model.quantize={bits}: trainer=fsdp divides whole weights only; use trainer=ddp, where each process has "
            "all of the quantised ones, or leave model.quantize out"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantize={bits}: needs the library bitsandbytes; run pip install 'trim-lightning[quantize]'"
        )


def check_trainer(trainer: Mapping[str, Any], planned: bool = False) -> None:
    """Let Lightning itself judge unusual trainer arguments before anything is read; plain ones need no import of it.

    A plan (``planned``) of what needs a launcher can be made without one.

    Raises:
        UserError: for an argument that Trainer does not have, a device that is absent, or several of them.
    """
    usual = set(trainer) <= {"accelerator", "devices", "num_nodes"} and trainer.get("accelerator") in ("auto", "cpu")
    single = all(type(trainer.get(name, 1)) is int and trainer.get(name, 1) == 1 for name in ("devices", "num_nodes"))
    if not (usual and single and launched_size() == 1):
        from trim_lightning.engine.devices import one_device
        from trim_lightning.engine.trainer import make_trainer, needs_launcher

        alone = planned and needs_launcher(trainer) is not None
        make_trainer(one_device(trainer) if alone else trainer, [])


def check_training(settings: TrainSettings) -> None:
    """Check keys by themselves and together, before anything is read.

    Raises:
        UserError: naming the keys.
    """
    check_settings(settings)
    check_trainer(settings.trainer, planned=settings.dry_run)
    if settings.model.quantize is not None and settings.train.mode == "full":
        raise UserError(
            f"model.quantize={settings.model.quantize}: quantised weights are not trained, and train=full trains all; "
            "use train=lora, or leave model.quantize out"
        )
    if settings.train.base is not None and settings.train.model is None:
        raise UserError(f"train.base={settings.train.base}: the trainee is the scorer; set model.base, or train.model")
    evaluation = settings.evaluation
    if evaluation.path is not None and evaluation.generated:
        raise UserError("evaluation.path and evaluation.generated=true: two held-out sets; give one of them")
    if evaluation.tasks:
        from trim_lightning.evaluation.harness.run import check_tasks

        check_tasks(evaluation)
    if (evaluation.objective or "").startswith("eval/") and not (
        evaluation.path or evaluation.generated or evaluation.tasks
    ):
        raise UserError(
            f"evaluation.objective={evaluation.objective} needs something to evaluate; give evaluation.path=FILE, "
            "evaluation=generated or evaluation.tasks"
        )
    tuning = settings.train
    if tuning.early_stop_path is not None and tuning.early_stop is None:
        raise UserError(
            f"train.early_stop_path={tuning.early_stop_path}: there is no early stop that watches it; give "
            "train.early_stop too"
        )
    if tuning.early_stop is not None and not (tuning.early_stop_path or evaluation.path or evaluation.generated):
        raise UserError(
            "train.early_stop needs held-out records; give train.early_stop_path=FILE (or, where nothing is reported "
            "on it, evaluation.path=FILE)"
        )


def check_target(settings: SelectSettings) -> None:
    """Refuse the built-in targets for a pool of the user's own: a forgotten target set would give a wrong coreset.

    Raises:
        UserError: saying how to name a target set.
    """
    if settings.pool.source != "generated" and settings.target.source == "generated":
        raise UserError(
            "target: the pool is your own, the target set still the built-in one; give target=jsonl target.path=FILE, "
            "or target=from_pool"
        )
