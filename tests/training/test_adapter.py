"""The adapter on disk is the model that was evaluated, for plain PEFT too; a bad one is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from training.conftest import TrainingFiles
from trim_lightning.errors import UserError
from trim_lightning.models.adapter import apply_adapter
from trim_lightning.models.load import load_model
from trim_lightning.models.source import find_model
from trim_lightning.pipeline.train import Training
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.store import Store

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def run(training_files: TrainingFiles, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A finished training with held-out records."""
    from running import run_train

    directory = tmp_path_factory.mktemp("adapter_run")
    return run_train(
        *training_files.train, training_files.held_out("plain"), output_dir=directory, store_dir=training_files.store
    )


@pytest.fixture
def base(training_files: TrainingFiles) -> Callable[[], PreTrainedModel]:
    """Loads the base model as the product does."""
    source = find_model(ModelSettings(path=str(training_files.root / "model")), Store(training_files.store))
    return lambda: load_model(source, torch.float32)


@pytest.fixture
def adapter(run: Training, tmp_path: Path) -> Path:
    """A copy of the trained adapter, to be damaged."""
    return Path(shutil.copytree(run.directory / "adapter", tmp_path / "adapter"))


def plain_peft(training_files: TrainingFiles, adapter: Path) -> PreTrainedModel:
    """The model as any PEFT user loads it, with transformers' own attention."""
    model = AutoModelForCausalLM.from_pretrained(training_files.root / "model", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, str(adapter)).eval()
    assert model.config._attn_implementation == "sdpa"
    return loaded


def chats(training_files: TrainingFiles) -> list[tuple[str, str, str]]:
    """Id, text before the response, and response of each held-out record, written out by hand."""
    records = map(json.loads, (training_files.root / "plain.jsonl").read_text().splitlines())
    form = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    return [(record["id"], form.format(**record), record["response"]) for record in records]


def test_plain_peft_gives_the_logits_of_the_evaluated_model(
    run: Training, training_files: TrainingFiles, base: Callable[[], PreTrainedModel]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(training_files.root / "model")
    ours, theirs = (
        apply_adapter(base(), run.directory / "adapter"),
        plain_peft(training_files, run.directory / "adapter"),
    )
    untrained = base()
    for _, prompt, response in chats(training_files)[:4]:
        input_ids = tokenizer(prompt + response, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = theirs(input_ids=input_ids).logits
            torch.testing.assert_close(ours(input_ids=input_ids).logits, expected, rtol=0, atol=1e-5)
            assert (untrained(input_ids=input_ids).logits - expected).abs().max() > 0.05


def test_plain_peft_gives_the_loss_that_was_reported(run: Training, training_files: TrainingFiles) -> None:
    tokenizer = AutoTokenizer.from_pretrained(training_files.root / "model")
    model = plain_peft(training_files, run.directory / "adapter").double()
    lines = [json.loads(line) for line in (run.directory / "predictions.jsonl").read_text().splitlines()]
    total = tokens = 0.0
    for line, (name, prompt, response) in zip(lines, chats(training_files), strict=True):
        before, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + response)["input_ids"]
        assert whole[: len(before)] == before
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole])).logits[0, len(before) - 1 : -1]
        loss = cross_entropy(logits, torch.tensor(whole[len(before) :]), reduction="sum").item()
        assert (line["id"], line["num_tokens"]) == (name, len(whole) - len(before))
        assert line["nll"] == pytest.approx(loss, rel=1e-5)
        total, tokens = total + loss, tokens + line["num_tokens"]
    assert run.metrics["eval/nll"] == pytest.approx(total / tokens, rel=1e-5)


def test_merging_changes_nothing_but_rounding(
    run: Training, training_files: TrainingFiles, base: Callable[[], PreTrainedModel]
) -> None:
    merged = apply_adapter(base(), run.directory / "adapter", gradients=False)
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = plain_peft(training_files, run.directory / "adapter")(input_ids=input_ids).logits
        torch.testing.assert_close(merged(input_ids=input_ids).logits, expected, rtol=0, atol=1e-4)


@pytest.fixture
def low_precision(training_files: TrainingFiles) -> Callable[[], PreTrainedModel]:
    """Loads the model in bfloat16."""
    source = find_model(ModelSettings(path=str(training_files.root / "model")), Store(training_files.store))
    return lambda: load_model(source, torch.bfloat16)


def test_a_warmed_up_scorer_keeps_its_rotary_frequencies(
    run: Training, low_precision: Callable[[], PreTrainedModel]
) -> None:
    """Rounded to bfloat16 they would bend every position; transformers loads them in float32."""
    expected = low_precision().model.rotary_emb.inv_freq
    scorer = apply_adapter(low_precision(), run.directory / "adapter", gradients=False)
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.bfloat16}
    assert scorer.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(scorer.model.rotary_emb.inv_freq, expected)


def test_bfloat16_weights_round_no_small_update_away(
    run: Training, base: Callable[[], PreTrainedModel], low_precision: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """An update smaller than half a step of the weights, as a low learning rate gives it."""
    small = tmp_path / "small"
    shutil.copytree(run.directory / "adapter", small)
    matrices = load_file(small / WEIGHTS)
    save_file({name: value / 2000 if "lora_B" in name else value for name, value in matrices.items()}, small / WEIGHTS)

    def update(scorer: PreTrainedModel, untouched: PreTrainedModel, rounded: bool) -> torch.Tensor:
        """What the adapter adds to the first layer's query, for inputs that only its weights can change."""
        torch.manual_seed(0)
        states = torch.randn(64, untouched.config.hidden_size)
        before, after = (model.model.layers[0].self_attn.q_proj for model in (untouched, scorer))
        if not rounded:
            return after(states) - before(states)
        return (states.to(torch.bfloat16) @ after.down.T @ after.up.T).float()

    exact = update(apply_adapter(base(), small, gradients=False), base(), rounded=False)
    merged = PeftModel.from_pretrained(low_precision(), str(small)).merge_and_unload()
    weights = [model.model.layers[0].self_attn.q_proj.weight for model in (merged, low_precision())]
    assert (weights[0] == weights[1]).float().mean() > 0.9  # why it is not merged
    kept = update(apply_adapter(low_precision(), small, gradients=False), low_precision(), rounded=True)
    share = float((kept * exact).sum() / (exact * exact).sum())
    assert share == pytest.approx(1, abs=0.02)


def test_saving_asks_no_network_and_warns_of_nothing(
    training_files: TrainingFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.utils import save_and_load

    from running import run_train

    asked: list[str] = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda name, *_: asked.append(name))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        run_train(*training_files.train, "seed=77", output_dir=tmp_path, store_dir=tmp_path / "store")
    assert asked == []
    assert not [str(warning.message) for warning in heard if "peft" in warning.filename]


def test_the_files_name_no_local_path(run: Training, training_files: TrainingFiles, adapter: Path) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "model"  # the folder's name
    assert config["peft_type"] == "LORA"
    assert "base_model: model\n" in (adapter / "README.md").read_text()
    for file in adapter.iterdir():
        content = file.read_bytes()
        assert str(training_files.root).encode() not in content, file.name
        assert not re.search(rb"/(tmp|home|root|Users|work)/", content), file.name


def test_the_adapter_holds_trained_matrices_alone(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    assert len(tensors) == 4 * 4 * 2  # layers, projections, A and B
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all("lora_A" in name or "lora_B" in name for name in tensors)


# what is refused


def zeroed(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) if part in name else tensor for name, tensor in tensors.items()}


def without(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def poisoned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(iter(tensors))
    return {**tensors, first: torch.full_like(tensors[first], float("nan"))}


def save(tensors: dict[str, torch.Tensor], adapter: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, adapter / WEIGHTS)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "adapter_config.json is missing"),
    "no weights": (lambda adapter: (adapter / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "no config": (lambda adapter: (adapter / CONFIG).unlink(), "adapter_config.json is missing"),
    "pickled": (lambda adapter: (adapter / WEIGHTS).rename(adapter / "adapter_model.bin"), "safetensors is missing"),
    "cut short": (lambda adapter: truncate(adapter / WEIGHTS, 5000), "is corrupt"),
    "header cut short": (lambda adapter: truncate(adapter / WEIGHTS, 5), "is corrupt"),
    "no bytes": (lambda adapter: truncate(adapter / WEIGHTS, 0), "is corrupt"),
    "config cut short": (lambda adapter: truncate(adapter / CONFIG, 40), "is corrupt"),
    "config of nothing": (lambda adapter: (adapter / CONFIG).write_text("{}"), "does not fit the model or is damaged"),
    "no tensors": (lambda adapter: save_file({}, adapter / WEIGHTS), "is empty"),
    "all zero": (lambda adapter: save(zeroed(load_file(adapter / WEIGHTS), "lora"), adapter), "are zero"),
    "B zero": (lambda adapter: save(zeroed(load_file(adapter / WEIGHTS), "lora_B"), adapter), "are zero"),
    "A zero": (lambda adapter: save(zeroed(load_file(adapter / WEIGHTS), "lora_A"), adapter), "are zero"),
    "without B": (lambda adapter: save(without(load_file(adapter / WEIGHTS), "lora_B"), adapter), "are zero"),
    "not a number": (lambda adapter: save(poisoned(load_file(adapter / WEIGHTS)), adapter), "not finite"),
    "a layer short": (
        lambda adapter: save(without(load_file(adapter / WEIGHTS), "layers.3."), adapter), "8 weights without",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused(damage: str, adapter: Path, base: Callable[[], PreTrainedModel]) -> None:
    harm, message = DAMAGE[damage]
    harm(adapter)
    with pytest.raises(UserError) as caught:
        apply_adapter(base(), adapter)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("adapter adapter: ")


@pytest.mark.parametrize("architecture", ["opt", "gemma3"])
def test_an_adapter_of_another_model_is_refused(
    architecture: str, adapter: Path, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    with pytest.raises(UserError, match="does not fit the model"):
        apply_adapter(tiny_model(architecture), adapter)


def test_an_adapter_damaged_in_the_store_is_trained_again(
    run: Training, training_files: TrainingFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from running import run_train

    store = tmp_path / "store"
    first = run_train(*training_files.train, output_dir=tmp_path / "first", store_dir=store)
    (entry,) = (store / "finetune").iterdir()
    damaged = entry / "adapter" / WEIGHTS
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = run_train(*training_files.train, output_dir=tmp_path / "again", store_dir=store)
    assert "is damaged" in caplog.text
    assert not again.manifest["stages"]["finetune"]["cached"]
    assert (again.directory / "adapter" / WEIGHTS).read_bytes() == content
    assert first.manifest["adapter"] == again.manifest["adapter"]
