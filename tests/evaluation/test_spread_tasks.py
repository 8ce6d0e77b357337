"""lm-eval's requests answered by passes of the engine give what lm-eval finds with a model in its own hands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from evaluation.conftest import CPU
from evaluation.test_lm_eval import NUMBERS, OPTIONS, PASSAGES, needs_lm_eval, write
from trim_lightning.engine.devices import Resources
from trim_lightning.errors import UserError
from trim_lightning.evaluation.harness.run import Spread, run_tasks
from trim_lightning.models.load import ModelRecipe, empty_model, load_tokenizer
from trim_lightning.models.source import ModelSource
from trim_lightning.settings.schema import EvaluationSettings

# texts of several windows, and options of one token each, which share one forward pass
TASK_FILES = {
    "whole_texts": """
task: whole_texts
custom_dataset: !function texts.load
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "letters": """
task: letters
custom_dataset: !function texts.load
test_split: test
output_type: multiple_choice
doc_to_text: "{{text[:30]}}"
doc_to_choice: ["a", "b", "c"]
doc_to_target: 1
metric_list: [{metric: acc}, {metric: brier_score}]
""",
}
TEXTS = """
from datasets import Dataset

def load(**_):
    return {"test": Dataset.from_list([{"text": f"{n} eggs in a box " * (3 + 17 * n)} for n in range(11)])}
"""


@needs_lm_eval
def test_passes_answer_as_lm_eval_does(
    tiny_model: Callable[[str], PreTrainedModel], tiny_source: Callable[[str], ModelSource], tmp_path: Path
) -> None:
    long = {"id": "b", "prompt": "coins remain " * 400, "response": "x", "answer": "x", "subtask": "s"}
    for name, records in (("svamp", NUMBERS * 4), ("mmlu", OPTIONS), ("tydiqa_goldp", PASSAGES), ("bbh", [long])):
        write(tmp_path, f"{name}.test", records)
    own = tmp_path / "own"
    own.mkdir()
    (own / "texts.py").write_text(TEXTS)
    for name, text in TASK_FILES.items():
        (own / f"{name}.yaml").write_text(text)
    tasks = ["trim_svamp", "trim_mmlu", "trim_tydiqa_goldp", "trim_bbh", *TASK_FILES]
    settings = EvaluationSettings(tasks=tasks, data_dir=str(tmp_path), tasks_path=str(own), num_fewshot=0)
    source = tiny_source("llama")
    expected = run_tasks(tiny_model("llama"), load_tokenizer(source), settings, 0)
    spread = Spread(ModelRecipe(source, torch.float32), Resources(CPU), tmp_path / "passes")
    found = run_tasks(empty_model(source), load_tokenizer(source), settings, 0, None, spread)
    assert found == expected
    assert "lm-eval: prompts that are longer than the model takes lost their beginning" in found.warnings
    # what an earlier attempt has computed is not asked for again
    nowhere = replace(spread, recipe=ModelRecipe(replace(source, directory=tmp_path), torch.float32))
    assert run_tasks(empty_model(source), load_tokenizer(source), settings, 0, None, nowhere) == expected
    (tmp_path / "passes/0/shard-000000.parquet").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        run_tasks(empty_model(source), load_tokenizer(source), settings, 0, None, nowhere)
