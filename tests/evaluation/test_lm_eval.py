"""The lm-eval bridge: scores against hand computation and plain transformers, prompts, provenance, mistakes."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trim_lightning.errors import UserError
from trim_lightning.evaluation.harness import run as harness
from trim_lightning.evaluation.harness import tasks as lm_eval_tasks
from trim_lightning.evaluation.harness.run import TaskResults, check_tasks, data_digest
from trim_lightning.evaluation.harness.tasks import LOCAL_TASKS, local_counterpart
from trim_lightning.models.load import load_tokenizer
from trim_lightning.models.source import ModelSource
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import LineSource, ReadOptions
from trim_lightning.settings.schema import EvaluationSettings
from trim_lightning.stages.trainee import Trainee
from trim_lightning.store import StageKey, Store
from trim_lightning.store.ledger import Ledger

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

Records = Iterable[dict[str, Any]]

NUMBERS = [
    {"id": "n0", "prompt": "add 3 and 4", "response": "3 + 4 = 7.\nThe answer is 7.", "answer": "7"},
    {"id": "n1", "prompt": "add 2000 and 10", "response": "That is 2010.\nThe answer is 2,010.", "answer": "2010"},
    {"id": "n2", "prompt": "take 9 from 4", "response": "4 - 9 = -5\nThe answer is -5.", "answer": -5},
    {"id": "n3", "prompt": "half of 5", "response": "The answer is 2.5.", "answer": "2.5"},
]
OPTIONS = [
    {
        "id": f"o{number}",
        "prompt": f"which box holds {number} eggs?\n(A) this\n(B) that\n(C) none",
        "response": f"The answer is ({letter}).",
        "answer": letter,
        "choices": ["this", "that", "none"],
        "subtask": subtask,
    }
    for number, (letter, subtask) in enumerate(
        [("A", "eggs"), ("B", "eggs"), ("C", "eggs"), ("C", "eggs"), ("A", "boxes"), ("B", "boxes")]
    )
]
PASSAGES = [
    {
        "id": "p0",
        "language": "english",
        "context": "The first train left Vienna in the year 1837.",
        "question": "When did it leave?",
        "answers": ["1837", "the year 1837"],
    },
    {
        "id": "p1",
        "language": "finnish",
        "context": "Juna lähti Wienistä.",
        "question": "Mistä juna lähti?",
        "answers": {"text": ["Wienistä"], "answer_start": [11]},
    },
    {
        "id": "p2",
        "language": "english",
        "context": "Ferries cross the bay at night.",
        "question": "What crosses the bay?",
        "answers": ["Ferries"],
    },
]


def write(folder: Path, name: str, records: Records) -> Path:
    """Write records to ``<folder>/<name>.jsonl`` and return the folder."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@dataclass
class Found:
    """What `harness.run_tasks` gives, and one dict for each example of each task, from what lm-eval gave it."""

    metrics: dict[str, float]
    details: dict[str, dict[str, Any]]
    warnings: tuple[str, ...]
    samples: dict[str, list[dict[str, Any]]]


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = harness.BATCH,
    seed: int = 0,
    chat_template: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> Found:
    """`harness.run_tasks`, with lm-eval's own results looked into."""
    import lm_eval

    seen: dict[str, Any] = {}
    real = lm_eval.simple_evaluate

    def keep(**settings: Any) -> Any:
        results = real(**settings)
        seen.update(results["samples"])
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "BATCH", batch_size)
        patch.setattr(lm_eval, "simple_evaluate", keep)
        settings = EvaluationSettings(tasks=list(tasks), task_limit=limit, **options)
        found = harness.run_tasks(model, tokenizer, settings, seed, chat_template)
    samples = {name: samples_of(examples) for name, examples in seen.items()}
    return Found(found.metrics, found.details, found.warnings, samples)


def samples_of(examples: Iterable[Any]) -> list[dict[str, Any]]:
    """One dict per document; lm-eval gives one per document and answer filter."""
    merged: dict[int, dict[str, Any]] = {}
    for example in examples:
        document = example["doc"]
        identity = document.get("id", example["doc_id"]) if isinstance(document, dict) else example["doc_id"]
        answers = [given[0] for given in example["resps"]]
        output = answers[0] if len(answers) == 1 else [answer[0] for answer in answers]
        line = merged.setdefault(
            example["doc_id"], {"id": identity, "output": output, "target": plain_number(example["target"])}
        )
        line |= {name: plain_number(value) for name, value in harness._measures(example).items()}
    return list(merged.values())


def plain_number(value: Any) -> Any:
    """NumPy's numbers as Python's, which JSON takes."""
    return value.item() if hasattr(value, "item") else value


@pytest.fixture
def llama(tiny_model: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def tokenizer(tiny_source: Callable[[str], ModelSource]) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_source("llama"))


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict[str, Any]], str]], None]:
    """Makes the model say, for every record, what a function of it gives."""
    from lm_eval.models.huggingface import HFLM

    def patch(answer: Callable[[dict[str, Any]], str]) -> None:
        monkeypatch.setattr(HFLM, "generate_until", lambda self, requests: [answer(item.doc) for item in requests])

    return patch


# ---------------------------------------------------------------- scores


@needs_lm_eval
def test_number_scores_by_hand(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, says: Callable[..., None], tmp_path: Path
) -> None:
    write(tmp_path, "gsm8k.test", NUMBERS)
    answers = {
        "n0": "3 and 4 make 7.\nThe answer is 7.",  # both
        "n1": "so $2,010 in all",  # flexible only
        "n2": "The answer is -5. Check: 4 - 9 is not 13",  # strict only: the last number is another
        "n3": "The answer is 2",  # neither
    }
    says(lambda record: answers[record["id"]])
    found = run_tasks(llama, tokenizer, ["trim_gsm8k"], data_dir=str(tmp_path))
    assert found.metrics == {"trim_gsm8k/exact_match_strict": 0.5, "trim_gsm8k/exact_match_flexible": 0.5}
    assert found.samples["trim_gsm8k"] == [
        {"id": "n0", "output": answers["n0"], "target": "7", "exact_match_strict": 1, "exact_match_flexible": 1},
        {"id": "n1", "output": answers["n1"], "target": "2010", "exact_match_strict": 0, "exact_match_flexible": 1},
        {"id": "n2", "output": answers["n2"], "target": "-5", "exact_match_strict": 1, "exact_match_flexible": 0},
        {"id": "n3", "output": answers["n3"], "target": "2.5", "exact_match_strict": 0, "exact_match_flexible": 0},
    ]
    # the standard error of the mean of 1, 0, 1, 0: sqrt(1/3) / sqrt(4)
    assert found.details["trim_gsm8k"]["stderr"]["exact_match_strict"] == pytest.approx(math.sqrt(1 / 12))
    assert json.loads(json.dumps([found.metrics, found.details, found.samples])), "all of it is JSON"


@needs_lm_eval
def test_bbh_scores_by_hand(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, says: Callable[..., None], tmp_path: Path
) -> None:
    answers = {
        "b0": ("True", "not False is True. So the answer is True."),  # both
        "b1": ("(B)", "the answer is (A)? No.\nSo the answer is (B)"),  # the last one counts
        "b2": ("] } ]", "We close them.\n] } ]"),  # flexible only
        "b3": ("oven sun", "So the answer is sun oven."),  # neither
    }
    write(
        tmp_path,
        "bbh.test",
        [
            {"id": name, "prompt": name, "response": gold, "answer": gold, "subtask": "odd" if name > "b1" else "even"}
            for name, (gold, _) in answers.items()
        ],
    )
    says(lambda record: answers[record["id"]][1])
    found = run_tasks(llama, tokenizer, ["trim_bbh"], data_dir=str(tmp_path))
    assert found.metrics == {"trim_bbh/exact_match_strict": 0.5, "trim_bbh/exact_match_flexible": 0.75}
    assert found.details["trim_bbh"]["by_group"] == {
        "even": {"exact_match_strict": 1, "exact_match_flexible": 1, "examples": 2},
        "odd": {"exact_match_strict": 0, "exact_match_flexible": 0.5, "examples": 2},
    }
    assert found.details["trim_bbh"]["shots"] == 0
    assert found.warnings[0].startswith("trim_bbh: 0 shots, not its 3: bbh.train.jsonl has no more")


@needs_lm_eval
def test_tydiqa_scores_by_hand(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, says: Callable[..., None], tmp_path: Path
) -> None:
    write(tmp_path, "tydiqa_goldp.test", PASSAGES)
    answers = {
        "p0": "\n The Year 1837!\nand nothing more",  # the first line; equals the second gold answer
        "p1": "Juna lähti Wienistä",  # one of three words
        "p2": "",
    }
    says(lambda record: answers[record["id"]])
    found = run_tasks(llama, tokenizer, ["trim_tydiqa_goldp"], data_dir=str(tmp_path))
    assert found.metrics == {
        "trim_tydiqa_goldp/exact_match": pytest.approx(1 / 3),
        "trim_tydiqa_goldp/f1": pytest.approx((1 + 2 / 4) / 3),  # p1: precision 1/3, recall 1
    }
    assert found.details["trim_tydiqa_goldp"]["by_group"] == {
        "english": {"exact_match": 0.5, "f1": 0.5, "examples": 2},
        "finnish": {"exact_match": 0, "f1": 0.5, "examples": 1},
    }
    prompt = found.details["trim_tydiqa_goldp"]["first_prompt"]
    assert PASSAGES[0]["context"] in prompt
    assert PASSAGES[0]["question"] in prompt


@needs_lm_eval
def test_passage_scores() -> None:
    from trim_lightning.evaluation.tasks.local_data import passage_scores

    both = {"exact_match": 1.0, "f1": 1.0}
    assert passage_scores("The cat's hat.", ["cats hat"], "english") == both
    assert passage_scores("«Wien»", ["wien"], "finnish") == both
    assert passage_scores("২০০০ সালে।", ["২০০০ সালে"], "bengali") == both
    # "a" is a word in other languages
    assert passage_scores("a b", ["b"], "swahili") == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    # a word counts as often as both have it: 2 of 3 and 2 of 2
    assert passage_scores("x x y", ["x x"], "english") == {"exact_match": 0.0, "f1": pytest.approx(4 / 5)}
    assert passage_scores("x", ["y", "x z", "x"], "english") == both
    assert passage_scores("the", ["x"], "english") == {"exact_match": 0.0, "f1": 0.0}


WORDS = st.lists(st.sampled_from(["the", "a", "An", "cat", "Cat.", "hat", "..", "Wien"]), max_size=5).map(" ".join)


@needs_lm_eval
@given(WORDS, st.lists(WORDS, min_size=1, max_size=3), st.sampled_from(["english", "finnish"]))
def test_passage_scores_are_consistent(prediction: str, answers: list[str], language: str) -> None:
    from trim_lightning.evaluation.tasks.local_data import passage_scores

    found = passage_scores(prediction, answers, language)
    assert 0 <= found["f1"] <= 1
    assert found["exact_match"] <= found["f1"], "an exact match shares every word"
    assert found == passage_scores(prediction, answers[::-1], language)
    assert passage_scores(answers[0], answers, language)["exact_match"] == 1


@pytest.fixture(scope="module")
def number_patterns() -> tuple[str, str]:
    """The flexible pattern of our number tasks, and that of lm-eval's gsm8k."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    theirs = Path(lm_eval.tasks.__file__).parent / "gsm8k"
    index = TaskManager(include_defaults=False, include_path=[str(lm_eval_tasks.TASKS_FOLDER), str(theirs)]).task_index
    pair = []
    for task, name in (("trim_gsm8k", "flexible"), ("gsm8k", "flexible-extract")):
        filters = {item["name"]: item["filter"][0] for item in index[task].cfg["filter_list"]}
        assert filters[name]["group_select"] == -1
        pair.append(filters[name]["regex_pattern"])
    return pair[0], pair[1]


@needs_lm_eval
@given(text=st.text(alphabet="0123456789.,$-+ ab\n", max_size=30))
def test_numbers_are_found_as_lm_eval_finds_them(number_patterns: tuple[str, str], text: str) -> None:
    from lm_eval.filters.extraction import RegexFilter

    ours, theirs = (
        RegexFilter(regex_pattern=pattern, group_select=-1).apply([[text]], [{}]) for pattern in number_patterns
    )
    assert list(ours) == list(theirs)


def adapted(model: PreTrainedModel) -> Any:
    """The model with a LoRA adapter that changes what it computes."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.linspace(-1, 1, weight.numel()).reshape(weight.shape))
    return tuned.eval()


def log_likelihood(model: Any, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> float:
    """Summed log-probability of a continuation, by one plain forward pass.

    White space at the end of the context is counted to the continuation, as lm-eval does.
    """
    ids = tokenizer(context + continuation, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = len(tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        probabilities = model(input_ids=ids[:, :-1]).logits[0].float().log_softmax(-1)
    return sum(float(probabilities[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


@needs_lm_eval
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "llama with adapter"])
@pytest.mark.parametrize("template", [True, False])
def test_options_are_those_of_plain_transformers(
    tiny_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    architecture: str,
    template: bool,
) -> None:
    write(tmp_path, "mmlu.test", OPTIONS)
    model: Any = tiny_model(architecture.split()[0])
    if "adapter" in architecture:
        model = adapted(model)
    if not template:
        tokenizer.chat_template = None
    found = run_tasks(model, tokenizer, ["trim_mmlu"], data_dir=str(tmp_path), batch_size=4)
    records = {record["id"]: record for record in OPTIONS}
    correct = []
    for sample in found.samples["trim_mmlu"]:
        record = records[sample["id"]]
        if template:
            turns = [{"role": "user", "content": record["prompt"]}]
            context = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            context = record["prompt"] + "\n"
        expected = [log_likelihood(model, tokenizer, context, f"The answer is ({letter}).") for letter in "ABC"]
        assert sample["output"] == pytest.approx(expected, abs=2e-3)
        assert sample["target"] == "ABC".index(record["answer"])
        correct.append(int(np.argmax(expected)) == sample["target"])
        assert sample["acc"] == correct[-1]
    assert len(correct) == len(OPTIONS)
    assert found.metrics == {"trim_mmlu/acc": pytest.approx(np.mean(correct))}


@needs_lm_eval
def test_log_likelihoods_of_a_bfloat16_model_are_in_float32(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write(tmp_path, "mmlu.test", OPTIONS[:2])
    model: Any = llama.to(torch.bfloat16)
    found = run_tasks(model, tokenizer, ["trim_mmlu"], data_dir=str(tmp_path), batch_size=1)
    for record, sample in zip(OPTIONS, found.samples["trim_mmlu"], strict=False):
        turns = [{"role": "user", "content": record["prompt"]}]
        context = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        expected = [log_likelihood(model, tokenizer, context, f"The answer is ({letter}).") for letter in "ABC"]
        assert sample["output"] == pytest.approx(expected, abs=1e-3)  # sums of bfloat16 would be off by up to 0.25


@needs_lm_eval
def test_a_rendered_conversation_gets_no_further_special_tokens(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    write(tmp_path, "mmlu.test", OPTIONS[:2])
    start = ("<|im_start|>", tokenizer.bos_token_id)
    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[start])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id, "a tokenizer that puts BOS before every text"
    template = "{% for message in messages %}Q: {{ message['content'] }}\nA:{% endfor %}"
    found = run_tasks(llama, tokenizer, ["trim_mmlu"], data_dir=str(tmp_path), chat_template=template, batch_size=1)
    for record, sample in zip(OPTIONS, found.samples["trim_mmlu"], strict=False):
        context = f"Q: {record['prompt']}\nA:"
        expected = [log_likelihood(llama, tokenizer, context, f"The answer is ({letter}).") for letter in "ABC"]
        assert sample["output"] == pytest.approx(expected, abs=1e-3)


@needs_lm_eval
def test_an_adapter_changes_the_scores(
    tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write(tmp_path, "mmlu.test", OPTIONS)
    before, after = (
        run_tasks(model, tokenizer, ["trim_mmlu"], data_dir=str(tmp_path)).samples["trim_mmlu"]
        for model in (tiny_model("llama"), adapted(tiny_model("llama")))
    )
    for old, new in zip(before, after, strict=True):
        assert not np.allclose(old["output"], new["output"], atol=0.1)


@needs_lm_eval
def test_answers_are_those_of_plain_transformers(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write(tmp_path, "tydiqa_goldp.test", PASSAGES)
    found = run_tasks(llama, tokenizer, ["trim_tydiqa_goldp"], data_dir=str(tmp_path), batch_size=2)
    end = tokenizer.eos_token_id
    prompts = {record["id"]: passage_prompt(record) for record in PASSAGES}
    generate: Any = llama.generate
    for sample in found.samples["trim_tydiqa_goldp"]:
        turns = [{"role": "user", "content": prompts[sample["id"]]}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        tokens = generate(input_ids=ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :].tolist()
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        assert sample["output"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert sample["output"]


def passage_prompt(record: dict[str, Any]) -> str:
    """The prompt that the task file describes."""
    return f"{record['context']}\n\nQuestion: {record['question']}\nAnswer with a few words from the text above."


# ---------------------------------------------------------------- prompts, shots, provenance


@needs_lm_eval
def test_shots_come_from_the_records_own_group(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write(tmp_path, "mmlu.test", OPTIONS[:1] + OPTIONS[4:5])
    write(tmp_path, "mmlu.train", OPTIONS[1:4] + OPTIONS[5:] + [{**OPTIONS[5], "prompt": "one more"}])
    found = run_tasks(llama, tokenizer, ["trim_mmlu"], data_dir=str(tmp_path), num_fewshot=2)
    shots = [OPTIONS[1], OPTIONS[2]]  # the first two of the same subtask
    turns = [
        turn
        for shot in shots
        for turn in (
            {"role": "user", "content": shot["prompt"]},
            {"role": "assistant", "content": shot["response"]},
        )
    ]
    turns.append({"role": "user", "content": OPTIONS[0]["prompt"]})
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert found.details["trim_mmlu"]["first_prompt"] == expected
    assert found.details["trim_mmlu"]["shots"] == 2
    too_many: dict[str, Any] = {"data_dir": str(tmp_path), "num_fewshot": 3}
    message = r"num_fewshot=3: trim_mmlu has 2 examples .* every subtask in mmlu\.train"
    with pytest.raises(UserError, match=message):
        run_tasks(llama, tokenizer, ["trim_mmlu"], **too_many)
    with pytest.raises(UserError, match=message):
        check_tasks(EvaluationSettings(tasks=["trim_mmlu"], **too_many))


@needs_lm_eval
def test_a_plain_prompt_reads_as_in_training(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, says: Callable[..., None], tmp_path: Path
) -> None:
    write(tmp_path, "svamp.test", NUMBERS[:1])
    write(tmp_path, "svamp.train", NUMBERS[1:2])
    says(lambda record: "The answer is 7.")
    options: dict[str, Any] = {"data_dir": str(tmp_path), "num_fewshot": 1}
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    plain = run_tasks(llama, bare, ["trim_svamp"], **options)
    details = plain.details["trim_svamp"]
    assert details["first_prompt"] == f"{NUMBERS[1]['prompt']}\n{NUMBERS[1]['response']}\n\n{NUMBERS[0]['prompt']}"
    assert details["stop"] == ["\n\n", tokenizer.eos_token]
    assert details["template"]["chat_template_sha256"] is None
    chat = run_tasks(llama, tokenizer, ["trim_svamp"], **options).details["trim_svamp"]
    assert chat["stop"] == [tokenizer.eos_token]
    assert len(chat["template"]["chat_template_sha256"]) == 64


@needs_lm_eval
@pytest.mark.parametrize("clock", ["date_string", "strftime_now('%d %b %Y')"])
@pytest.mark.parametrize("given", [False, True])
def test_the_date_in_a_prompt_is_that_of_training(
    clock: str,
    given: bool,
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    says: Callable[..., None],
    tmp_path: Path,
) -> None:
    from trim_lightning.tokens.rendering import DATE

    write(tmp_path, "svamp.test", NUMBERS[:1])
    says(lambda record: "")
    template = "{{ " + clock + " }}|" + tokenizer.chat_template
    if not given:
        tokenizer.chat_template = template
    found = run_tasks(
        llama, tokenizer, ["trim_svamp"], data_dir=str(tmp_path), chat_template=template if given else None
    )
    details = found.details["trim_svamp"]
    assert details["first_prompt"].startswith(f"{DATE}|")
    assert details["template"]["chat_template_sha256"] == hashlib.sha256(template.encode()).hexdigest()


@needs_lm_eval
def test_the_date_is_part_of_the_key_of_tasks_and_tokens(
    store: Store, tiny_source: Callable[[str], ModelSource], pool_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        """The key that the store was asked for."""

    def ask(key: StageKey, *_: Any, **__: Any) -> None:
        raise Asked(key.hex)

    trainee = Trainee(tiny_source("llama"), "float32", store, Ledger(), trainer={}, seed=0, max_length=64)
    records = index(LineSource(pool_file, label="pool", name="pool", what="pool"), ReadOptions())
    monkeypatch.setattr(store, "get", ask)
    keys = set()
    for date in ("26 Jul 2024", "27 Jul 2024"):
        monkeypatch.setattr("trim_lightning.tokens.rendering.DATE", date)
        keys.add(trainee.tokens_key(records).hex)
        with pytest.raises(Asked) as asked:
            harness.task_scores(trainee, None, EvaluationSettings(tasks=["trim_svamp"]), seed=0)
        keys.add(str(asked.value))
    assert len(keys) == 4


@needs_lm_eval
def test_warnings_are_told_from_the_store_too(
    store: Store, tiny_source: Callable[[str], ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "run_tasks", lambda *_: TaskResults(warnings=("prompts lost their beginning",)))
    for cached in (False, True):
        ledger = Ledger()
        trainee = Trainee(tiny_source("llama"), "float32", store, ledger, trainer={}, seed=0, max_length=64)
        harness.task_scores(trainee, None, EvaluationSettings(tasks=["trim_svamp"]), seed=0)
        assert ledger.stages["tasks_before"].cached is cached
        assert ledger.warnings == ["prompts lost their beginning"]


@needs_lm_eval
def test_a_given_template_replaces_the_tokenizers(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, says: Callable[..., None], tmp_path: Path
) -> None:
    write(tmp_path, "svamp.test", NUMBERS[:1])
    says(lambda record: "")
    given = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    own = tokenizer.chat_template
    found = run_tasks(llama, tokenizer, ["trim_svamp"], data_dir=str(tmp_path), chat_template=given)
    assert found.details["trim_svamp"]["first_prompt"] == "[add 3 and 4]"
    sha256 = hashlib.sha256(given.encode()).hexdigest()
    assert found.details["trim_svamp"]["template"]["chat_template_sha256"] == sha256
    assert tokenizer.chat_template == own


@needs_lm_eval
def test_provenance(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, says: Callable[..., None], tmp_path: Path
) -> None:
    from lm_eval import __version__

    write(tmp_path, "gsm8k.test", NUMBERS)
    says(lambda record: record["response"])
    found = run_tasks(llama, tokenizer, ["trim_gsm8k"], data_dir=str(tmp_path), limit=3)
    details = found.details["trim_gsm8k"]
    turns = [{"role": "user", "content": NUMBERS[0]["prompt"]}]
    assert details.pop("template")["doc_to_text"] == "prompt"
    assert details == {
        "scores": {"exact_match_strict": 1.0, "exact_match_flexible": 1.0},
        "stderr": {"exact_match_strict": 0.0, "exact_match_flexible": 0.0},
        "higher_is_better": {"exact_match": True},
        "shots": 0,
        "task_version": 1.0,
        "lm_eval": __version__,
        "stop": [tokenizer.eos_token],
        "max_gen_toks": 256,
        "examples": 3,
        "examples_available": 4,
        "first_prompt": tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
    }


@needs_lm_eval
def test_a_limit_covers_the_groups_evenly(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write(tmp_path, "mmlu.test", OPTIONS)  # four of eggs, then two of boxes
    found = run_tasks(llama, tokenizer, ["trim_mmlu"], data_dir=str(tmp_path), limit=4)
    assert [sample["id"] for sample in found.samples["trim_mmlu"]] == ["o0", "o4", "o1", "o5"]


@needs_lm_eval
def test_shots_are_drawn_by_seed(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, says: Callable[..., None], tmp_path: Path
) -> None:
    write(tmp_path, "gsm8k.test", NUMBERS[:1])
    write(tmp_path, "gsm8k.train", [{**NUMBERS[1], "prompt": f"shot {number}"} for number in range(30)])
    says(lambda record: "")

    def prompt(seed: int) -> str:
        found = run_tasks(llama, tokenizer, ["trim_gsm8k"], data_dir=str(tmp_path), num_fewshot=3, seed=seed)
        return str(found.details["trim_gsm8k"]["first_prompt"])

    assert prompt(1) == prompt(1)
    assert prompt(1) != prompt(2)


@needs_lm_eval
def test_the_data_folder_may_come_from_the_environment(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    says: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, "svamp.test", NUMBERS)
    monkeypatch.setenv("TRIM_DATA_DIR", str(tmp_path))
    says(lambda record: record["response"])
    assert run_tasks(llama, tokenizer, ["trim_svamp"]).metrics["trim_svamp/exact_match_strict"] == 1


@needs_lm_eval
def test_long_prompts_and_answers_are_noted(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    long = {"id": "b", "prompt": "coins remain " * 400, "response": "x", "answer": "x", "subtask": "s"}
    write(tmp_path, "bbh.test", [long])
    found = run_tasks(llama, tokenizer, ["trim_bbh"], data_dir=str(tmp_path), num_fewshot=0)
    assert found.details["trim_bbh"]["max_gen_toks"] == 256, "half of the model's 512 positions"
    assert found.warnings == (
        "trim_bbh: answers end after 256 tokens, not 512: the model takes 512",
        "lm-eval: prompts that are longer than the model takes lost their beginning",
    )


# ---------------------------------------------------------------- further tasks and groups

COLOURS = """
task: colour_{name}
custom_dataset: !function colours.load
dataset_kwargs: {{rows: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: options
doc_to_target: right
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2}}
"""
COLOURS_CODE = """
from datasets import Dataset

def load(rows, **_):
    return {"test": Dataset.from_list([{"question": f"q{n}", "options": ["red", "blue"], "right": 0}
                                       for n in range(rows)])}
"""


@pytest.fixture
def colour_tasks(tmp_path: Path) -> Path:
    """Task files of a user: two tasks, a group of them with a score, and one without."""
    folder = tmp_path / "my_tasks"
    folder.mkdir()
    (folder / "colours.py").write_text(COLOURS_CODE)
    for name, rows in (("warm", 2), ("cold", 3)):
        (folder / f"{name}.yaml").write_text(COLOURS.format(name=name, rows=rows))
    members = "task: [colour_warm, colour_cold]\n"
    (folder / "scored.yaml").write_text(
        f"group: colours\n{members}aggregate_metric_list: [{{metric: acc, weight_by_size: true}}]\n"
    )
    (folder / "loose.yaml").write_text(f"group: loose_colours\n{members}")
    return folder


@needs_lm_eval
def test_groups_report_their_own_score_or_their_members(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    colour_tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.models.huggingface import HFLM

    # right for q0 and q1, wrong for q2: warm 2 of 2, cold 2 of 3
    monkeypatch.setattr(
        HFLM,
        "loglikelihood",
        lambda self, requests: [
            (0.0 if (item.doc["question"] == "q2") == item.args[1].endswith("blue") else -1.0, False)
            for item in requests
        ],
    )
    monkeypatch.setattr(lm_eval_tasks, "_hub_answers", lambda: False)
    found = run_tasks(llama, tokenizer, ["colours"], tasks_path=str(colour_tasks))
    assert found.metrics == {"colours/acc": pytest.approx(4 / 5)}
    assert found.details["colours"]["members"] == ["colour_warm", "colour_cold"]
    assert found.details["colour_cold"]["scores"] == {"acc": pytest.approx(2 / 3)}
    assert found.details["colour_cold"]["task_version"] == 2
    loose = run_tasks(llama, tokenizer, ["loose_colours"], tasks_path=str(colour_tasks))
    assert loose.metrics == {"colour_warm/acc": 1.0, "colour_cold/acc": pytest.approx(2 / 3)}
    with pytest.raises(UserError, match="colour_warm is in there twice"):
        run_tasks(llama, tokenizer, ["colours", "colour_warm"], tasks_path=str(colour_tasks))


@needs_lm_eval
def test_errors_of_metrics_that_are_no_means_are_bootstrapped_here(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    colour_tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import multiprocessing

    from lm_eval.api.task import ConfigurableTask

    def no_pool(*arguments: Any, **options: Any) -> None:
        raise AssertionError("lm-eval forks processes beside running threads")

    monkeypatch.setattr(multiprocessing, "Pool", no_pool)
    monkeypatch.setattr(lm_eval_tasks, "_hub_answers", lambda: False)
    text = (colour_tasks / "cold.yaml").read_text().replace("acc, aggregation: mean", "likelihood, aggregation: median")
    (colour_tasks / "cold.yaml").write_text(text.replace("rows: 3", "rows: 9"))
    monkeypatch.setattr(ConfigurableTask, "process_results", lambda self, doc, results: {"likelihood": results[0][0]})
    found = run_tasks(llama, tokenizer, ["colour_cold"], tasks_path=str(colour_tasks))
    details, samples = found.details["colour_cold"], found.samples["colour_cold"]
    values = [sample["likelihood"] for sample in samples]
    assert found.metrics == {"colour_cold/likelihood": np.median(values)}
    draw = np.random.default_rng(0)
    expected = np.std(np.median(draw.choice(values, (4000, len(values))), axis=1))
    assert details["stderr"]["likelihood"] == pytest.approx(expected, rel=0.25)
    assert capfd.readouterr() == ("", "")


@needs_lm_eval
def test_broken_task_files_are_named(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, colour_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval_tasks, "_hub_answers", lambda: False)
    (colour_tasks / "colours.py").write_text("def load(**_):\n    raise KeyError('rows')\n")
    with pytest.raises(UserError, match=r"colour_warm cannot be loaded \(KeyError: 'rows'\)"):
        run_tasks(llama, tokenizer, ["colour_warm"], tasks_path=str(colour_tasks))
    (colour_tasks / "warm.yaml").write_text("task: [colour_warm\n")
    with pytest.raises(UserError, match=r"warm\.yaml is not valid YAML"):
        run_tasks(llama, tokenizer, ["colour_warm"], tasks_path=str(colour_tasks))
    with pytest.raises(UserError, match="tasks_path=nowhere: there is no such folder"):
        run_tasks(llama, tokenizer, ["colour_warm"], tasks_path="nowhere")


# ---------------------------------------------------------------- mistakes, offline, side effects


def test_no_tasks_need_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    nothing: Any = None
    assert harness.run_tasks(nothing, nothing, EvaluationSettings(), 0) == TaskResults()
    with pytest.raises(UserError, match=r"needs the library lm-eval; run pip install 'trim-lightning\[eval\]'"):
        harness.run_tasks(nothing, nothing, EvaluationSettings(tasks=["trim_gsm8k"]), 0)


def test_local_counterparts() -> None:
    names = ("gsm8k", "gsm8k_cot", "mmlu", "mmlu_anatomy", "bbh_zeroshot", "commonsense_qa", "tydiqa_goldp_fi")
    assert {name: local_counterpart(name) for name in names} == {
        "gsm8k": "trim_gsm8k",
        "gsm8k_cot": "trim_gsm8k",
        "mmlu": "trim_mmlu",
        "mmlu_anatomy": "trim_mmlu",
        "bbh_zeroshot": "trim_bbh",
        "commonsense_qa": "trim_commonsense_qa",
        "tydiqa_goldp_fi": "trim_tydiqa_goldp",
    }
    assert [local_counterpart(name) for name in ("hellaswag", "social_iqa", "kmmlu")] == [None] * 3


BAD_RECORDS: dict[str, tuple[str, str]] = {
    "trim_gsm8k": ('{"prompt": "p", "response": "r"}', r"gsm8k\.test\.jsonl line 2: field answer is missing"),
    "trim_svamp": ("{", r"svamp\.test\.jsonl line 2 is not valid JSON"),
    "trim_mmlu": (
        json.dumps({**OPTIONS[0], "answer": "D"}),
        r"mmlu\.test\.jsonl line 2: choices must be two or more texts, and answer the letter",
    ),
    "trim_tydiqa_goldp": (
        json.dumps({**PASSAGES[0], "answers": []}),
        r"tydiqa_goldp\.test\.jsonl line 2: field answers must be a list",
    ),
    "trim_commonsense_qa": ("[1]", r"commonsense_qa\.test\.jsonl line 2 is not a JSON object"),
}


@needs_lm_eval
@pytest.mark.parametrize("task", BAD_RECORDS)
def test_bad_records_are_named_by_file_and_line(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, task: str
) -> None:
    line, message = BAD_RECORDS[task]
    (tmp_path / f"{task.removeprefix('trim_')}.test.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=message):
        run_tasks(llama, tokenizer, [task], data_dir=str(tmp_path))


@needs_lm_eval
def test_missing_data_is_named(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRIM_DATA_DIR", raising=False)
    with pytest.raises(UserError, match=r"trim_svamp reads svamp\.test\.jsonl: set evaluation\.data_dir"):
        run_tasks(llama, tokenizer, ["trim_svamp"])
    with pytest.raises(UserError, match=r"there is no svamp\.test\.jsonl for trim_svamp"):
        run_tasks(llama, tokenizer, ["trim_svamp"], data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"there is no svamp\.test\.jsonl for trim_svamp"):
        check_tasks(EvaluationSettings(tasks=["trim_svamp"], data_dir=str(tmp_path)))
    write(tmp_path, "svamp.test", [])
    with pytest.raises(UserError, match=r"svamp\.test\.jsonl is empty"):
        run_tasks(llama, tokenizer, ["trim_svamp"], data_dir=str(tmp_path))


@needs_lm_eval
def test_offline_names_the_local_task_at_once(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config
    import lm_eval.tasks
    from huggingface_hub import constants

    monkeypatch.setattr(lm_eval_tasks, "_hub_answers", lambda: False)
    started = time.monotonic()
    for folder, task, remedy in (
        ("gsm8k", "gsm8k", r"use the local task trim_gsm8k with evaluation\.data_dir=FOLDER"),
        ("hellaswag", "hellaswag", "run it once with a network"),
    ):
        # its own folder stands in for the whole index, which takes seconds to read
        theirs = str(Path(lm_eval.tasks.__file__).parent / folder)
        with pytest.raises(UserError, match=rf"the data of {task} cannot be fetched .*{remedy}"):
            run_tasks(llama, tokenizer, [task], tasks_path=theirs)
    assert time.monotonic() - started < 10, "no retries"
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


@needs_lm_eval
def test_an_unreachable_hub_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not lm_eval_tasks._hub_answers()


@needs_lm_eval
def test_the_digest_follows_the_files(colour_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIM_DATA_DIR", raising=False)
    write(tmp_path, "svamp.test", NUMBERS)
    write(tmp_path, "gsm8k.test", NUMBERS)
    svamp = EvaluationSettings(tasks=["trim_svamp"])
    seen = [data_digest(replace(svamp, data_dir=str(tmp_path)))]
    monkeypatch.setenv("TRIM_DATA_DIR", str(tmp_path))
    assert data_digest(svamp) == seen[0]
    write(tmp_path, "gsm8k.test", NUMBERS[:2])
    assert data_digest(svamp) == seen[0], "another task's data"
    write(tmp_path, "svamp.test", NUMBERS[:3])
    seen.append(data_digest(svamp))
    write(tmp_path, "svamp.train", NUMBERS[3:])
    seen.append(data_digest(svamp))
    seen.append(data_digest(replace(svamp, tasks_path=str(colour_tasks))))
    (colour_tasks / "colours.py").write_text(COLOURS_CODE + "# changed\n")
    seen.append(data_digest(replace(svamp, tasks_path=str(colour_tasks))))
    assert len(set(seen)) == 5


@needs_lm_eval
def test_progress_is_shown_by_our_bar(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trim_lightning.console.progress import progress_bar

    write(tmp_path, "commonsense_qa.test", OPTIONS)
    write(tmp_path, "tydiqa_goldp.test", PASSAGES)
    bars = []

    def keep(title: str, total: int, unit: str) -> Any:
        bars.append(progress_bar(title, total, unit))
        return bars[-1]

    monkeypatch.setattr(lm_eval_tasks, "progress_bar", keep)
    run_tasks(llama, tokenizer, ["trim_commonsense_qa", "trim_tydiqa_goldp"], data_dir=str(tmp_path))
    assert {(bar.desc.strip(), bar.n, bar.total) for bar in bars} == {
        ("lm-eval options", 18, 18),
        ("lm-eval answers", 3, 3),
    }


@needs_lm_eval
@pytest.mark.slow
def test_an_unknown_task_gets_the_closest_names(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"no task is called trim_gsm8; did you mean trim_gsm8k\? local ones are"):
        run_tasks(llama, tokenizer, ["trim_gsm8"])
    with pytest.raises(UserError, match=r"no task is called helaswag; did you mean hellaswag\?"):
        run_tasks(llama, tokenizer, ["helaswag"])


@needs_lm_eval
def test_nothing_is_left_changed_or_printed(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    import lm_eval.models.huggingface
    import tqdm

    write(tmp_path, "commonsense_qa.test", OPTIONS)
    write(tmp_path, "tydiqa_goldp.test", PASSAGES)
    tokenizer.pad_token = None
    llama.train()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)

    def state() -> tuple[Any, ...]:
        weights = [weight.clone() for weight in llama.parameters()]
        generators = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        logger = logging.getLogger("lm_eval")
        surroundings = (list(logger.handlers), logger.propagate)
        return weights, generators, surroundings, llama.training, tokenizer.pad_token, tokenizer.padding_side

    before = copy.deepcopy(state())
    with caplog.at_level(logging.INFO):
        run_tasks(llama, tokenizer, ["trim_commonsense_qa", "trim_tydiqa_goldp"], data_dir=str(tmp_path))
    after = state()
    assert all(torch.equal(old, new) for old, new in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]
    assert lm_eval.models.huggingface.tqdm is tqdm.tqdm
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# ---------------------------------------------------------------- the shared data


@pytest.fixture
def data_dir() -> str:
    folder = os.environ.get("TRIM_DATA_DIR")
    if not folder:
        pytest.skip("TRIM_DATA_DIR is not set")
    return folder


REAL_TASKS = [task for task in LOCAL_TASKS if task != "trim_tydiqa_goldp"]


@needs_lm_eval
@pytest.mark.data
def test_the_shared_data_loads(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data_dir: str) -> None:
    found = run_tasks(llama, tokenizer, REAL_TASKS, data_dir=data_dir, limit=2, num_fewshot=1)
    assert {name.split("/")[0] for name in found.metrics} == set(REAL_TASKS)
    for task in REAL_TASKS:
        assert (found.details[task]["examples"], found.details[task]["shots"]) == (2, 1)
    available = {task: found.details[task]["examples_available"] for task in REAL_TASKS}
    assert available == {
        "trim_bbh": 1080,
        "trim_commonsense_qa": 1221,
        "trim_gsm8k": 1319,
        "trim_mmlu": 1140,
        "trim_svamp": 300,
    }


@needs_lm_eval
@pytest.mark.data
def test_gold_responses_of_the_shared_data_are_right(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    says: Callable[..., None],
    data_dir: str,
    tmp_path: Path,
) -> None:
    """Whoever answers with the record's own response is right: the extraction fits the data."""
    for task in ("gsm8k", "svamp", "bbh"):
        lines = (Path(data_dir) / f"{task}.train.jsonl").read_text(encoding="utf-8")
        (tmp_path / f"{task}.test.jsonl").write_text(lines, encoding="utf-8")
    says(lambda record: record["response"])
    tasks: Sequence[str] = ["trim_gsm8k", "trim_svamp", "trim_bbh"]
    found = run_tasks(llama, tokenizer, tasks, data_dir=str(tmp_path), num_fewshot=0)
    assert set(found.metrics.values()) == {1.0}, found.metrics
