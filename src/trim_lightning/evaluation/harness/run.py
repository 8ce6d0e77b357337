"""The bridge to lm-eval (EleutherAI's language model evaluation harness): its tasks on a model in memory.

lm-eval builds the prompts, runs the model and computes the metrics. This module finds the tasks, ours over local
files among them (``tasks/``), renders prompts as training does, turns lm-eval's errors into one line each, keeps it
quiet, and records with every score how it came about.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_lightning.errors import UserError
from trim_lightning.evaluation.harness.quiet import _quiet
from trim_lightning.evaluation.harness.results import TaskResults, _collect
from trim_lightning.evaluation.harness.tasks import (
    DATA_VARIABLE,
    LOCAL_TASKS,
    TASKS_FOLDER,
    _check_installed,
    _check_task_files,
    _fit,
    _fit_shots,
    _listed,
    _load,
    _one_line,
    _task_manager,
)
from trim_lightning.records.record_file import sha256_of
from trim_lightning.store.keys import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAP = 200  # resamples for the standard error of a metric that is not a mean


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    tasks_path: str | None = None,
    data_dir: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = True,
    chat_template: str | None = None,
    seed: int = 0,
) -> TaskResults:
    """Run lm-eval tasks on a model that is already loaded.

    Model, tokenizer and global random state are left as they were.

    Args:
        model: A causal LM, on the device on which to run.
        tokenizer: Its tokenizer. Its chat template renders the prompts, with the same fixed date as in training.
        tasks: Names of tasks, groups or tags: lm-eval's own, those in ``tasks_path``, or `LOCAL_TASKS`.
        tasks_path: Folder of further task files.
        data_dir: Folder of the local tasks' ``<task>.test.jsonl`` files; None takes TRIM_DATA_DIR.
        num_fewshot: Shots; None takes each task's own number.
        limit: The first so many examples of each task; None takes all.
        batch_size: Sequences in one forward pass.
        apply_chat_template: False gives plain prompts, as for a tokenizer without a template.
        chat_template: Text of a template to use instead of the tokenizer's own.
        seed: Of the choice of shots, and of sampling where a task samples.

    Returns:
        Scores, how they came about, and what was answered.

    Raises:
        UserError: if lm-eval is missing, a task is unknown or broken, its data cannot be had, or it has too few
            shots.
    """
    if not tasks:
        return TaskResults()
    _check_installed()
    from lightning.pytorch.utilities.seed import isolate_rng
    from lm_eval import simple_evaluate

    template = chat_template or tokenizer.chat_template
    chat = apply_chat_template and template is not None
    with _quiet() as heard, isolate_rng(), _left_as_found(model):
        manager = _task_manager(tasks, tasks_path, data_dir)
        loaded = _load(manager, tasks)
        harness = _wrap(model, tokenizer, batch_size, template if chat else None)
        notes = _fit(loaded, num_fewshot, harness.max_length, harness.max_gen_toks)
        try:
            results = simple_evaluate(
                model=harness,
                tasks=loaded.objects,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=chat,
                bootstrap_iters=BOOTSTRAP,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except ValueError as error:  # a task that needs images, or runs generated code
            raise UserError(f"evaluation.tasks={_listed(tasks)}: lm-eval refuses ({_one_line(error)})") from error
    assert results is not None  # it is None on further processes only, and there is one
    notes += [f"lm-eval: {message}" for message in sorted(set(heard))]
    template_hash = hashlib.sha256(str(template).encode()).hexdigest() if chat else None
    end = harness.tok_decode(harness.eot_token_id, skip_special_tokens=False)
    return _collect(results, loaded, template_hash, end, notes)


def check_tasks(
    tasks: Sequence[str],
    *,
    tasks_path: str | None = None,
    data_dir: str | None = None,
    num_fewshot: int | None = None,
) -> None:
    """Find and load tasks without a model, so that a mistake shows before hours of training.

    Raises:
        UserError: as `run_tasks`.
    """
    if not tasks:
        return
    _check_installed()
    with _quiet():
        for name, task in _load(_task_manager(tasks, tasks_path, data_dir), tasks).tasks.items():
            _fit_shots(name, task, num_fewshot)


def data_digest(tasks: Sequence[str], data_dir: str | None = None, tasks_path: str | None = None) -> str:
    """Digest of the files that the scores of tasks depend on, for cache keys.

    It covers lm-eval's version, our task files and their code, the local tasks' data, and every file in
    ``tasks_path``. What lm-eval's own tasks fetch from the Hub is outside it.

    Raises:
        UserError: if lm-eval is missing or ``tasks_path`` is no folder.
    """
    if not tasks:
        return digest_of([])
    _check_installed()
    from lm_eval import __version__

    files = [path for path in (*TASKS_FOLDER.iterdir(), TASKS_FOLDER.with_name("options.py")) if path.is_file()]
    local = LOCAL_TASKS if tasks_path is not None else [name for name in tasks if name in LOCAL_TASKS]
    folder = Path(data_dir or os.environ.get(DATA_VARIABLE) or os.devnull).expanduser()
    for name in local:
        pair = (folder / f"{name.removeprefix('trim_')}.{split}.jsonl" for split in ("train", "test"))
        files += [path for path in pair if path.is_file()]
    if tasks_path is not None:
        _check_task_files(tasks_path)
        files += [path for path in Path(tasks_path).expanduser().rglob("*") if path.is_file() and path.suffix != ".pyc"]
    digests = sorted((path.name, sha256_of(path, str(path))) for path in files)
    return digest_of([__version__, [list(pair) for pair in digests]])


# ---------------------------------------------------------------- finding and loading tasks


# ---------------------------------------------------------------- the model, as lm-eval wants it


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, template: str | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    from trim_lightning.tokens.rendering import DATE

    own = copy.deepcopy(tokenizer)  # it may be given a padding token
    own.chat_template = template
    return HFLM(
        pretrained=model,
        tokenizer=own,
        backend="causal",
        batch_size=batch_size,
        softmax_dtype="float32",  # in bfloat16 the log-likelihoods of options tie
        # a rendered conversation holds its special tokens already, as in training
        add_bos_token=None if template is None else False,
        chat_template_args={"date_string": DATE},
    )


@contextlib.contextmanager
def _left_as_found(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    try:
        yield
    finally:
        model.train(training)


# ---------------------------------------------------------------- what came out
