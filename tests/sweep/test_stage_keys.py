"""Change each config key and each kind of input byte in turn: the right stages get other keys, and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from composing import compose_select, compose_train
from tiny_models import build_tiny_model, write_records
from trim_lightning.settings.key import known_keys
from trim_lightning.settings.schema import FineTuneSettings, SelectSettings, TrainSettings
from trim_lightning.sweep.plan import plan_job
from trim_lightning.sweep.planning_store import PlanningStore

STAGES = ("tokens", "warmup", "signals", "fingerprint", "score", "finetune", "evaluate")
Keys = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class StartFiles:
    """Files that the mutations start from."""

    root: Path

    def overrides(self) -> list[str]:
        return [
            "model=hf", f"model.path={self.root / 'tiny'}", "model.dtype=float32",
            "pool=jsonl", f"pool.path={self.root / 'pool.jsonl'}",
            "target=jsonl", f"target.path={self.root / 'targets.jsonl'}", "target.num_examples=6",
            "saliency.num_layers=2", "warmup.fraction=0.2",
            f"paths.store_dir={self.root / 'store'}", f"paths.output_dir={self.root / 'out'}",
        ]  # fmt: skip

    def training(self) -> list[str]:
        return [
            *self.overrides(), f"coreset.path={self.root / 'coreset.jsonl'}",
            f"evaluation.path={self.root / 'held_out.jsonl'}", "train.tokens_per_micro_batch=512",
        ]  # fmt: skip

    def select_keys(self, *overrides: str) -> Keys:
        return self.keys_of(compose_select([*self.overrides(), *overrides]))

    def train_keys(self, *overrides: str) -> Keys:
        return self.keys_of(compose_train([*self.training(), *overrides]))

    def keys_of(self, settings: SelectSettings) -> Keys:
        store = PlanningStore(self.root / "store")
        plan_job(settings, store)
        return {
            stage: tuple(sorted({wanted.key.hex for wanted in store.wanted if wanted.key.stage == stage}))
            for stage in STAGES
        }


@pytest.fixture(scope="module")
def start_files(tmp_path_factory: pytest.TempPathFactory) -> StartFiles:
    root = tmp_path_factory.mktemp("keys")
    build_tiny_model("llama", root / "tiny")
    build_tiny_model("llama", root / "other", seed=1)
    (root / "template.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    write_records(root / "pool.jsonl", 30, seed=1, groups=("first", "second"))
    write_records(root / "pool2.jsonl", 30, seed=9, groups=("first", "second"))
    write_records(root / "targets.jsonl", 12, seed=2, edge_cases=False, groups=("alpha", "beta"))
    write_records(root / "targets2.jsonl", 12, seed=8, edge_cases=False, groups=("alpha", "beta"))
    write_records(root / "coreset.jsonl", 6, seed=3, edge_cases=False)
    write_records(root / "coreset2.jsonl", 6, seed=7, edge_cases=False)
    for name, seed in (("held_out", 4), ("held_out2", 5)):
        write_records(root / f"{name}.jsonl", 6, seed=seed, edge_cases=False)
        lines = [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({**line, "answer": "7"}) + "\n" for line in lines))
    return StartFiles(root)


@pytest.fixture(scope="module")
def base(start_files: StartFiles) -> Keys:
    keys = start_files.select_keys()
    assert [len(keys[stage]) for stage in STAGES] == [2, 1, 1, 1, 1, 0, 0]
    return keys


@pytest.fixture(scope="module")
def train_base(start_files: StartFiles) -> Keys:
    keys = start_files.train_keys()
    assert [len(keys[stage]) for stage in STAGES] == [2, 0, 0, 0, 0, 1, 2]
    return keys


def changed(before: Keys, after: Keys) -> set[str]:
    return {stage for stage in STAGES if before[stage] != after[stage]}


NOTHING: set[str] = set()
SCORES = {"score"}
BANKS = {"fingerprint", *SCORES}
MODEL = {"warmup", "signals", *BANKS}
POOL = {"tokens", *MODEL}
TARGETS = {"tokens", "signals", *BANKS}
ELSEWHERE = "another kind of source reads it"  # of the keys that only another source has
SHAPE = "records of another shape have such a field"
# key -> (a value that differs from the base, stages that get other keys); a new key must be entered here
SELECTION: dict[str, tuple[str, set[str]] | str] = {
    "model.path": ("{root}/other", POOL),
    "model.revision": "of Hub models, whose files are hashed",
    "model.base": "of adapters, whose base model's files are hashed",
    "model.dtype": ("bfloat16", MODEL),
    "model.trust_remote_code": ("true", NOTHING),
    "model.device_map": ("cpu", NOTHING),
    "model.quantize": ("4bit", MODEL),
    "model.chat_template": ("{root}/template.jinja", POOL),
    "pool.source": ELSEWHERE,
    "pool.path": ("{root}/pool2.jsonl", POOL),
    "pool.prompt_field": ("response pool.response_field=prompt", POOL),
    "pool.response_field": ("id pool.prompt_field=prompt", POOL),
    "pool.id_field": ("subtask", POOL),
    "pool.system_field": ("subtask", POOL),
    "pool.thought_field": ("subtask", POOL),
    "pool.bad_records": ("skip", NOTHING),  # there are none
    "pool.where": ("{{subtask: [first]}}", POOL),
    "pool.exclude": ("{{subtask: [first]}}", POOL),
    "pool.limit": ("20", POOL),
    "pool.sample": ("20", POOL),
    "target.source": ELSEWHERE,
    "target.path": ("{root}/targets2.jsonl", TARGETS),
    "target.prompt_field": ("response target.response_field=prompt", TARGETS),
    "target.response_field": ("id target.prompt_field=prompt", TARGETS),
    "target.id_field": ("subtask", TARGETS),
    "target.system_field": ("subtask", TARGETS),
    "target.thought_field": ("subtask", TARGETS),
    "target.bad_records": ("skip", NOTHING),
    "target.where": ("{{subtask: [alpha]}}", TARGETS),
    "target.exclude": ("{{subtask: [alpha]}}", TARGETS),
    "target.num_examples": ("5", TARGETS),
    "target.group_field": ("subtask", TARGETS),  # drawn per group: other examples
    "target.single_groups": ("true", BANKS),
    "target.aggregate": ("mean", NOTHING),
    "target.noise": ("0.5", TARGETS),
    "warmup.epochs": ("3", MODEL),
    "warmup.learning_rate": ("0.001", MODEL),
    "warmup.schedule": ("cosine", MODEL),
    "warmup.warmup_ratio": ("0.5", MODEL),
    "warmup.batch_size": ("2", MODEL),
    "warmup.tokens_per_micro_batch": ("999", MODEL),
    "warmup.weight_decay": ("0.1", MODEL),
    "warmup.gradient_clip": ("0.5", MODEL),
    "warmup.gradient_checkpointing": ("true", MODEL),
    "warmup.lora_rank": ("4", MODEL),
    "warmup.lora_alpha": ("8", MODEL),
    "warmup.lora_dropout": ("0.5", MODEL),
    "warmup.lora_targets": ("[q_proj]", MODEL),
    "warmup.checkpoint_seconds": ("5", NOTHING),
    "warmup.enabled": ("false", MODEL),
    "warmup.fraction": ("0.5", MODEL),
    "saliency.num_layers": ("1", BANKS),
    "saliency.row_weight": ("0.3", BANKS),
    "saliency.column_weight": ("0.3", BANKS),
    "saliency.error_weight": ("0.3", BANKS),
    "saliency.normalize": ("none", BANKS),
    "fingerprint.token_class": ("next", BANKS),
    "fallback.mode": ("zero", NOTHING),
    "fallback.penalty": ("0.1", NOTHING),
    "fallback.nearest": ("hidden", SCORES),
    "pooler.name": ("max", NOTHING),
    "pooler.mean_weight": ("0.1", NOTHING),
    "pooler.max_weight": ("0.1", NOTHING),
    "pooler.coverage_weight": ("0.1", NOTHING),
    "pooler.token_weight": ("idf", NOTHING),
    "pooler.k": ("2", NOTHING),
    "pooler.temperature": ("1", NOTHING),
    "pooler.q": ("0.5", NOTHING),
    "selection.fraction": ("0.5", NOTHING),
    "selection.count": ("3", NOTHING),
    "selection.tokens": ("99", NOTHING),
    "selection.token_scope": ("response selection.tokens=99", NOTHING),
    "selection.cap_field": "goes with selection.cap",
    "selection.cap": ("1 selection.cap_field=subtask", NOTHING),
    "selection.dedup": ("near", NOTHING),
    "selection.near_threshold": ("0.5", NOTHING),
    "selection.min_tokens": ("3", NOTHING),
    "selection.max_tokens": ("99", NOTHING),
    "selection.require_response": ("true", NOTHING),
    "scoring.name": ("cascade", NOTHING),  # so few records are all scored in full
    **{
        f"scoring.cascade.{name}": "tests/methods/test_cascade.py"
        for name in ("layers", "model", "by", "keep", "recall")
    },
    "scoring.save_token_scores": ("true", NOTHING),
    "scoring.tokens_per_batch": ("333", SCORES),
    "scoring.num_workers": ("1", NOTHING),
    "scoring.share_prefixes": ("false", SCORES),
    "scoring.profile": ("true", NOTHING),
    "report.enabled": ("false", NOTHING),
    "report.examples": ("3", NOTHING),
    "logger.name": ("none", NOTHING),
    "logger.project": ("other", NOTHING),
    "logger.entity": ("other", NOTHING),
    "logger.group": ("other", NOTHING),
    "logger.tags": ("[other]", NOTHING),
    "logger.offline": ("true", NOTHING),
    "logger.log_artifacts": ("false", NOTHING),
    "logger.finish_timeout": ("5", NOTHING),
    "paths.output_dir": ("{root}/elsewhere", NOTHING),
    "paths.store_dir": "another store has the same keys: next test",
    "paths.store_lock": ("soft", NOTHING),
    "method": "each method has stages of its own",
    "trainer": ("{{accelerator: cpu, devices: 1}}", NOTHING),
    "max_length": ("40", POOL),
    "seed": ("1", POOL),  # the draw of targets, and the warm-up's
    "scope": ("response", BANKS),
    "dry_run": ("true", NOTHING),
}
for group in ("pool", "target"):
    for name in ("subset", "split", "revision", "families", "per_family", "generator_seed"):
        SELECTION[f"{group}.{name}"] = ELSEWHERE
    for name in ("messages_field", "history_field", "tools_field"):
        SELECTION[f"{group}.{name}"] = SHAPE

TUNED = {"finetune", "evaluate"}
TRAINING: dict[str, tuple[str, set[str]] | str] = {
    "coreset.path": ("{root}/coreset2.jsonl", {"tokens", *TUNED}),
    **{f"train.{spec}": (value, TUNED) for spec, value in {
        "epochs": "3", "learning_rate": "0.001", "schedule": "cosine", "warmup_ratio": "0.5", "batch_size": "2",
        "tokens_per_micro_batch": "999", "weight_decay": "0.1", "gradient_clip": "0.5",
        "gradient_checkpointing": "true", "lora_rank": "4", "lora_alpha": "8", "lora_dropout": "0.5",
        "lora_targets": "[q_proj]", "mode": "full", "seed": "5", "length_grouped": "true", "early_stop": "1",
    }.items()},
    "train.checkpoint_seconds": ("5", NOTHING),
    "train.early_stop_path": ("{root}/held_out2.jsonl train.early_stop=1", {"tokens", *TUNED}),
    "train.model": ("{root}/other", {"tokens", *TUNED}),
    "train.base": "of adapters, whose base model's files are hashed",
    "evaluation.path": ("{root}/held_out2.jsonl", {"tokens", "evaluate"}),
    "evaluation.generated": "goes with generated targets",
    "evaluation.prompt_field": ("response evaluation.response_field=prompt", {"tokens", "evaluate"}),
    "evaluation.response_field": ("answer evaluation.prompt_field=prompt", {"tokens", "evaluate"}),
    "evaluation.system_field": ("answer", {"tokens", "evaluate"}),
    "evaluation.thought_field": ("answer", {"tokens", "evaluate"}),
    "evaluation.bad_records": ("skip", NOTHING),
    "evaluation.split": ELSEWHERE,
    **{f"evaluation.{name}": SHAPE for name in ("messages_field", "history_field", "tools_field")},
    "evaluation.limit": ("3", {"tokens", "evaluate"}),
    "evaluation.seed": ("3", NOTHING),
    "evaluation.exact_match": ("never", {"evaluate"}),
    "evaluation.option_accuracy": ("never", NOTHING),  # the records have no options
    "evaluation.max_new_tokens": ("7", {"evaluate"}),
    "evaluation.stop": ("[x]", {"evaluate"}),
    "evaluation.bootstrap": ("200", NOTHING),
    "evaluation.objective": ("eval/exact_match", NOTHING),
    "evaluation.tasks": "a stage of their own",
    "evaluation.tasks_path": "of tasks",
    "evaluation.data_dir": "of tasks",
    "evaluation.num_fewshot": "of tasks",
    "evaluation.task_limit": "of tasks",
}  # fmt: skip


def test_every_key_is_listed() -> None:
    assert {name for name, _, _ in known_keys(SelectSettings)} == set(SELECTION)
    assert {name for name, _, _ in known_keys(TrainSettings)} == set(SELECTION) | set(TRAINING)
    assert all(f"train.{name}" in TRAINING for name, _, _ in known_keys(FineTuneSettings))


def assignment(start_files: StartFiles, name: str, value: str) -> list[str]:
    sign = "++" if value.startswith("{{") and name != "trainer" else ""
    first, *more = value.format(root=start_files.root).split(" ") if not value.startswith("{{") else [value.format()]
    return [f"{sign}{name}={first}", *more]


@pytest.mark.parametrize("name", [name for name, change in SELECTION.items() if not isinstance(change, str)])
def test_a_key_changes_the_stages_that_read_it(start_files: StartFiles, base: Keys, name: str) -> None:
    if name == "model.quantize":
        pytest.importorskip("bitsandbytes")
    change = SELECTION[name]
    assert not isinstance(change, str)
    value, expected = change
    after = start_files.select_keys(*assignment(start_files, name, value))
    assert changed(base, after) == expected, name


@pytest.mark.parametrize("name", [name for name, change in TRAINING.items() if not isinstance(change, str)])
def test_a_training_key_changes_the_stages_that_read_it(start_files: StartFiles, train_base: Keys, name: str) -> None:
    change = TRAINING[name]
    assert not isinstance(change, str)
    value, expected = change
    after = start_files.train_keys(*assignment(start_files, name, value))
    assert changed(train_base, after) == expected, name
    if expected == TUNED:
        assert set(train_base["evaluate"]) & set(after["evaluate"]), "the model before fine-tuning is the same"


def test_errors_of_candidates_are_kept_by_another_pass(start_files: StartFiles, base: Keys) -> None:
    assert changed(base, start_files.select_keys("pooler.token_weight=error")) == SCORES


def test_an_evaluation_belongs_to_its_batches(
    start_files: StartFiles, train_base: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another padding changes a record's loss by up to 7e-4 of it in bfloat16."""
    monkeypatch.setattr("trim_lightning.stages.model.TOKENS_PER_BATCH", {"cpu": 64, "cuda": 64})
    assert changed(train_base, start_files.train_keys()) == {"evaluate"}


def test_another_store_has_the_same_keys(start_files: StartFiles, base: Keys, tmp_path: Path) -> None:
    settings = compose_select([*start_files.overrides(), f"paths.store_dir={tmp_path}"])
    store = PlanningStore(tmp_path)
    plan_job(settings, store)
    assert {wanted.key.hex for wanted in store.wanted if wanted.key.stage == "score"} == set(base["score"])


BYTES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "a word of a pool record": (lambda root: replace_text(root / "pool.jsonl", "e", "f"), POOL),
    "one record more in the pool": (lambda root: append(root / "pool.jsonl"), POOL),
    "a word of a target": (lambda root: replace_text(root / "targets.jsonl", "e", "f"), TARGETS),
    "a weight": (lambda root: flip_last_byte(root / "tiny" / "model.safetensors"), POOL),
    "the tokenizer": (lambda root: replace_text(root / "tiny" / "tokenizer.json", "<pad>", "<pud>"), POOL),
    "the model's config": (lambda root: replace_text(root / "tiny" / "config.json", "1e-06", "1e-05"), POOL),
    "the model's readme": (lambda root: append(root / "tiny" / "README.md"), NOTHING),
    "the file's name and time": (lambda root: move(root / "pool.jsonl"), NOTHING),
}


@pytest.fixture
def copied(start_files: StartFiles, tmp_path: Path) -> StartFiles:
    shutil.copytree(start_files.root, tmp_path / "copy", ignore=shutil.ignore_patterns("store"))
    return StartFiles(tmp_path / "copy")


@pytest.mark.parametrize("name", BYTES)
def test_bytes_change_the_stages_that_read_them(copied: StartFiles, base: Keys, name: str) -> None:
    assert copied.select_keys() == base, "a copy of all files elsewhere has the same keys"
    change, expected = BYTES[name]
    change(copied.root)
    pool = next(copied.root.glob("*pool.jsonl"))
    assert changed(base, copied.select_keys(f"pool.path={pool}")) == expected


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1) if path.suffix == ".json" else text[: len(text) // 2]
                    + text[len(text) // 2 :].replace(old, new, 1))  # fmt: skip


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"prompt": "one more", "response": "record"}\n')


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def move(path: Path) -> None:
    path.rename(path.with_name("renamed_pool.jsonl"))
