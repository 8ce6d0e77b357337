"""Every configuration key: its type, default, permitted values and meaning.

These dataclasses are the schemas behind ``conf/``: Hydra merges the YAML files and the overrides into them,
so a key that is not here is an error. `check` adds what a type cannot say (choices, bounds). The rest of the
package receives these plain objects, never a ``DictConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trim_lightning.settings.key import key


@dataclass
class ModelSettings:
    """The scorer."""

    path: str = key("???", "a directory, a Hub id, or bundled:smollm2_135m")
    revision: str | None = key(None, "branch, tag or commit of a Hub model")
    base: str | None = key(None, "base model where `model.path` is an adapter; null takes the one that it names")
    dtype: str = key(
        "auto",
        "precision of the model; auto is bfloat16 where native",
        choices=("auto", "float32", "bfloat16"),
    )
    trust_remote_code: bool = key(False, "run the model folder's own Python code")
    device_map: str | None = key(None, "accelerate device map for a model larger than one device, e.g. auto")
    quantize: str | None = key(
        None,
        "keep the weights of linear layers in 4 or 8 bits, in LoRA trainings and in all passes; null keeps model.dtype",
        choices=("4bit", "8bit"),
    )
    chat_template: str | None = key(None, "a file with a Jinja chat template to use instead of the tokenizer's")


@dataclass
class SourceSettings:
    """Where records come from and how to read them."""

    source: str = key("generated", "kind of input", choices=("generated", "file", "jsonl", "parquet", "hub"))
    path: Any = key(None, "file, folder or glob, a list of them, or a Hub data set id", fields=True)
    prompt_field: Any = key(
        None, "field of the prompt, or a list of fields joined by blank lines; null recognises the layout", fields=True
    )
    response_field: str | None = key(None, "field of the response; null recognises the layout")
    messages_field: str | None = key(None, "field with the list of messages; null recognises the layout")
    system_field: str | None = key(None, "field of the system text; null takes `system` or `system_prompt`")
    history_field: str | None = key(None, "field of earlier turns; null takes `history`")
    tools_field: str | None = key(None, "field of the tools that may be called; null takes `tools`")
    thought_field: str | None = key(None, "field of the thought before the last response; null takes the usual names")
    id_field: str | None = key(None, "field of the id; null takes `id`, else the 0-based line number")
    bad_records: str = key(
        "error", "a record that cannot be read is an error, or left out, counted and listed", choices=("error", "skip")
    )
    where: dict[str, Any] = key({}, "keep records whose field has one of these values")
    exclude: dict[str, Any] = key({}, "drop records whose field has one of these values")
    subset: str | None = key(None, "configuration name of a Hub data set")
    split: str | None = key(None, "split to read where there are several; null takes `train` of a Hub data set")
    revision: str | None = key(None, "branch, tag or commit of a Hub data set")
    families: list[str] | None = key(None, "task families of the generated records; null takes all")
    per_family: int = key(8, "generated records per family", low=1)
    generator_seed: int = key(0, "seed of the generated records", low=0)


@dataclass
class PoolSettings(SourceSettings):
    """The candidate pool."""

    limit: int | None = key(None, "only the first N records", low=1)
    sample: int | None = key(None, "N records drawn by seed, kept in pool order", low=1)


@dataclass
class TargetSettings(SourceSettings):
    """The target set."""

    source: str = key(
        "generated", "kind of input", choices=("generated", "file", "jsonl", "parquet", "hub", "from_pool")
    )
    num_examples: int | None = key(10, "targets drawn by seed, per group if there are groups; null = all", low=1)
    group_field: str | None = key(None, "field that divides the targets into groups, one bank each")
    single_groups: bool = key(False, "every target is a group of its own, with a score of its own")
    aggregate: str = key("max", "how group scores become one", choices=("max", "mean", "round_robin"))
    noise: float = key(0.0, "share of the drawn targets replaced by pool records, for experiments", low=0, high=1)


@dataclass
class TuningSettings:
    """How a model is trained, in warm-up and in fine-tuning alike."""

    epochs: int = key(2, "passes over the records", low=1)
    learning_rate: float = key(2e-4, "peak learning rate", above=0)
    schedule: str = key("linear", "learning-rate schedule", choices=("linear", "cosine", "constant"))
    warmup_ratio: float = key(0.03, "share of the steps with a rising learning rate", low=0, high=1)
    batch_size: int = key(8, "records per optimiser step", low=1)
    tokens_per_micro_batch: int | None = key(
        None, "padded tokens per forward and backward pass; null takes what fits into the device's memory", low=1
    )
    weight_decay: float = key(0.0, "AdamW weight decay", low=0)
    gradient_clip: float = key(1.0, "largest gradient norm; 0 switches clipping off", low=0)
    gradient_checkpointing: bool | None = key(
        None, "recompute activations to save memory; null does so where they would not fit"
    )
    lora_rank: int = key(16, "rank of the LoRA matrices", low=1)
    lora_alpha: int = key(32, "LoRA scale numerator", low=1)
    lora_dropout: float = key(0.05, "dropout before the LoRA matrices", low=0, high=0.99)
    lora_targets: Any = key(
        "auto",
        "modules of the language model that get LoRA; auto is the projections of its attention, found by class",
        choices=("auto", "all-linear"),
        names=True,
    )
    checkpoint_seconds: float = key(60.0, "seconds between checkpoints that a killed run resumes from", above=0)


@dataclass
class WarmupSettings(TuningSettings):
    """LoRA warm-up of the scorer on a small random part of the pool."""

    enabled: bool = key(True, "false scores with the model as it is")
    fraction: float = key(0.05, "share of the pool to train on", above=0, high=1)


@dataclass
class SaliencySettings:
    """Which tokens of the targets matter."""

    num_layers: int = key(6, "last layers whose attention is read", low=1)
    row_weight: float = key(0.5, "weight of the row signal", low=0)
    column_weight: float = key(0.5, "weight of the column signal", low=0)
    error_weight: float = key(0.0, "weight of the model's error 1 - p at the token", low=0)
    normalize: str = key("minmax", "scaling of each signal within a sequence", choices=("minmax", "none"))


@dataclass
class FingerprintSettings:
    """Which hidden state stands for a token, in fingerprints and candidates alike."""

    token_class: str = key(
        "own",
        "a class's state is that at its token (own), or the one before, which predicts it (next)",
        choices=("own", "next"),
    )


@dataclass
class FallbackSettings:
    """How a token class without a fingerprint is matched."""

    mode: str = key("scale", "what the penalty does", choices=("scale", "discount", "zero"))
    penalty: float = key(0.9, "lambda: factor of a fallback similarity", low=0, high=1)
    nearest: str = key("embedding", "what makes a fingerprint near", choices=("embedding", "hidden"))


SCORINGS = ("plain", "cascade")
POOLERS = ("mean_max_coverage", "mean_max", "mean", "max", "topk_mean", "softmax_mean", "quantile")


@dataclass
class PoolerSettings:
    """How token similarities become one score."""

    name: str = key("mean_max_coverage", "pooling formula", choices=POOLERS)
    mean_weight: float = key(0.5, "weight of the mean")
    max_weight: float = key(0.5, "weight of the maximum")
    coverage_weight: float = key(0.05, "weight of the coverage")
    token_weight: str = key(
        "none",
        "weight of a token in mean and maximum: the idf of its class, or the model's error 1 - p at it",
        choices=("none", "idf", "error"),
    )
    k: int = key(8, "tokens averaged by topk_mean", low=1)
    temperature: float = key(0.1, "temperature of softmax_mean", above=0)
    q: float = key(0.9, "quantile taken by quantile", low=0, high=1)


@dataclass
class SelectionSettings:
    """The budget and the optional filters of the coreset. At most one budget; none means 5 %."""

    fraction: float | None = key(None, "share of the pool", above=0, high=1)
    count: int | None = key(None, "number of records", low=1)
    tokens: int | None = key(None, "content tokens", low=1)
    token_scope: str = key(
        "all", "content tokens that selection.tokens counts; only responses are trained on", choices=("all", "response")
    )
    cap_field: str | None = key(None, "field whose values are capped")
    cap: int | None = key(None, "largest number of selected records with one value of cap_field", low=1)
    dedup: str = key("none", "drop duplicates of better-ranked records", choices=("none", "exact", "near"))
    near_threshold: float = key(0.8, "Jaccard similarity that makes a near duplicate", above=0, high=1)
    min_tokens: int | None = key(None, "fewest content tokens of a selected record", low=1)
    max_tokens: int | None = key(None, "most content tokens of a selected record", low=1)
    require_response: bool = key(
        False, "leave out records without a response token, empty or cut off; true by default in trim-train"
    )


@dataclass
class TrainSelectionSettings(SelectionSettings):
    """The same of a selection that is trained on: there a record without a response is of no use."""

    require_response: bool = key(True, "leave out records without a response token, empty or cut off")


@dataclass
class CascadeSettings:
    """A cheap score for all records, the full one for the best by it. At most one of layers, model and by."""

    layers: int | None = key(
        None, "the cheap score is that of the scorer's first layers, so many; null: an eighth of them", low=1
    )
    model: str | None = key(None, "the cheap score is that of this small model: a directory or a Hub id")
    by: str | None = key(None, "the cheap score is that of a method without a model", choices=("bm25", "dsir"))
    keep: float | None = key(
        None, "share of the pool that gets the full score; null is chosen by recall", above=0, high=1
    )
    recall: float = key(0.98, "expected share of the best records that is found", above=0, high=1)


@dataclass
class ScoringSettings:
    """The pass over the pool."""

    name: str = key("plain", "the full score for all records, or for the best by a cheap one", choices=SCORINGS)
    cascade: CascadeSettings = field(default_factory=CascadeSettings)
    save_token_scores: bool = key(False, "write token_scores.parquet")
    profile: bool = key(False, "trace some batches of the scoring pass into profile/ of the output directory")
    tokens_per_batch: int | None = key(None, "padded tokens per batch; null fits the device", low=1)
    num_workers: int | None = key(
        None, "processes that make batches ahead of the model; null takes 2 for a GPU, else 0", low=0
    )
    share_prefixes: bool = key(True, "tokens that many records begin with are computed once a batch, where that pays")


@dataclass
class ReportSettings:
    """The page that shows a selection."""

    enabled: bool = key(True, "write report.html")
    examples: int = key(8, "candidates shown token by token at the top, around the cut, and at the bottom", low=1)


@dataclass
class PathSettings:
    """Where results go."""

    output_dir: str = key("", "this run's files")
    store_dir: str = key(".trim_store", "stage results shared by all runs")
    store_lock: str = key(
        "file",
        "how processes sharing the store wait for each other; soft or none where file locks do not work",
        choices=("file", "soft", "none"),
    )


@dataclass
class LoggerSettings:
    """Experiment tracking."""

    name: str = key("csv", "tracker", choices=("csv", "wandb", "none"))
    project: str = key("trim-lightning", "W&B project")
    entity: str | None = key(None, "W&B team or user")
    group: str | None = key(None, "W&B group; a sweep sets its own")
    tags: list[str] = key([], "W&B tags")
    offline: bool = key(False, "W&B without a network; on by itself when there is no key")
    finish_timeout: int = key(
        600, "seconds to wait for W&B, at most 60 at the start; what is left at the end is for `wandb sync`", low=1
    )
    log_artifacts: bool = key(True, "upload coreset, scores and adapter as W&B artifacts")


@dataclass
class SelectSettings:
    """All keys of ``select.py``."""

    model: ModelSettings = field(default_factory=ModelSettings)
    pool: PoolSettings = field(default_factory=PoolSettings)
    target: TargetSettings = field(default_factory=TargetSettings)
    warmup: WarmupSettings = field(default_factory=WarmupSettings)
    saliency: SaliencySettings = field(default_factory=SaliencySettings)
    fingerprint: FingerprintSettings = field(default_factory=FingerprintSettings)
    fallback: FallbackSettings = field(default_factory=FallbackSettings)
    pooler: PoolerSettings = field(default_factory=PoolerSettings)
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    paths: PathSettings = field(default_factory=PathSettings)
    method: dict[str, Any] = key({"name": "trim"}, "the selector and its own keys")
    trainer: dict[str, Any] = key({}, "arguments of lightning.Trainer")
    max_length: int = key(2048, "tokens of a record that are kept", low=1)
    seed: int = key(0, "seed of every draw", low=0, high=2**32 - 1)
    scope: str = key("all", "content tokens that count", choices=("all", "prompt", "response"))
    dry_run: bool = key(False, "print what would be done and what it takes, and do nothing")


@dataclass
class CoresetSettings:
    """A ready coreset in place of a selection."""

    path: str | None = key(None, "train on this file's records; null selects first")


@dataclass
class FineTuneSettings(TuningSettings):
    """Fine-tuning of the trainee on the coreset."""

    model: str | None = key(None, "trainee: a directory, a Hub id or bundled:smollm2_135m; null is the scorer")
    base: str | None = key(None, "base model where `train.model` is an adapter; null takes the one that it names")
    mode: str = key("lora", "which weights are trained", choices=("lora", "full"))
    seed: int | None = key(None, "seed of the training alone; null takes `seed`", low=0)
    length_grouped: bool = key(False, "put records of similar length into one optimiser step")
    early_stop: int | None = key(None, "epochs without a lower held-out loss after which training ends", low=1)
    early_stop_path: str | None = key(
        None, "held-out records that early stop watches; null takes those of the evaluation"
    )


@dataclass
class EvaluationSettings:
    """What is measured before and after fine-tuning."""

    path: Any = key(
        None, "held-out records: file, folder, glob or list of them; null evaluates nothing but tasks", fields=True
    )
    prompt_field: Any = key(None, "as `pool.prompt_field`, of the held-out records", fields=True)
    response_field: str | None = key(None, "as `pool.response_field`")
    messages_field: str | None = key(None, "as `pool.messages_field`")
    system_field: str | None = key(None, "as `pool.system_field`")
    history_field: str | None = key(None, "as `pool.history_field`")
    tools_field: str | None = key(None, "as `pool.tools_field`")
    thought_field: str | None = key(None, "as `pool.thought_field`")
    bad_records: str = key("error", "as `pool.bad_records`", choices=("error", "skip"))
    split: str | None = key(None, "as `pool.split`")
    generated: bool = key(False, "fresh records of the generated target families serve as held-out records")
    limit: int | None = key(None, "held-out records drawn by seed; null takes all", low=1)
    seed: int = key(0, "seed of that draw and of the bootstrap", low=0)
    exact_match: str = key("auto", "greedy generation against `answer`", choices=("auto", "always", "never"))
    option_accuracy: str = key("auto", "log-likelihood of each of `choices`", choices=("auto", "always", "never"))
    max_new_tokens: int = key(128, "longest generated answer", low=1)
    stop: list[str] = key([], "texts that end a generated answer, besides the end of turn")
    bootstrap: int = key(1000, "bootstrap samples of an interval", low=100)
    tasks: list[str] = key([], "lm-eval tasks, built-in names or our local ones (trim_gsm8k ...)")
    tasks_path: str | None = key(None, "folder of further lm-eval task files")
    data_dir: str | None = key(None, "folder of <task>.test.jsonl files for our local tasks")
    num_fewshot: int | None = key(None, "shots of the lm-eval tasks; null takes each task's own", low=0)
    task_limit: int | None = key(None, "examples per lm-eval task; null takes all", low=1)
    objective: str | None = key(
        None, "number of metrics.json that a sweeper gets, e.g. eval/exact_match; null is eval/nll if there is one"
    )


@dataclass
class TrainSettings(SelectSettings):
    """All keys of ``train.py``: those of a selection, and what follows it."""

    selection: TrainSelectionSettings = field(default_factory=TrainSelectionSettings)
    coreset: CoresetSettings = field(default_factory=CoresetSettings)
    train: FineTuneSettings = field(default_factory=FineTuneSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
