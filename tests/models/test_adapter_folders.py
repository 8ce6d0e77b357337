"""An adapter's folder as ``model.path``: its base model is found, the adapter is on top, both are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from running import run_select, run_train
from tiny_models import write_records
from trim_lightning.errors import UserError
from trim_lightning.models.adapter import without_gradients
from trim_lightning.models.load import load_model
from trim_lightning.models.lora import add_lora
from trim_lightning.models.low_rank import LowRankLinear
from trim_lightning.models.source import find_model
from trim_lightning.settings.schema import ModelSettings, TuningSettings
from trim_lightning.store import Store

IDS = torch.arange(3, 23)[None]


def save_adapter(base: Path, folder: Path, seed: int = 0, **options: Any) -> Path:
    """An adapter that changes every projection, as PEFT saves it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = options.pop("target_modules", ["q_proj", "k_proj", "v_proj", "o_proj"])
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def base(tiny_folder: Callable[[str], Path]) -> Path:
    """A tiny LLaMA."""
    return tiny_folder("llama")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on it."""
    return save_adapter(base, tmp_path_factory.mktemp("adapters") / "tuned")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_what_peft_loads(dtype: torch.dtype, base: Path, adapter: Path, store: Store) -> None:
    source = find_model(ModelSettings(path=str(adapter)), store)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, str(adapter)))
    found = load_model(source, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float((expected - before).std())
    assert float((logits(found) - expected).abs().mean()) < tolerance
    assert float((expected - before).abs().mean()) > 10 * tolerance
    assert any(isinstance(module, LowRankLinear) for module in found.modules()) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_trained_on_top_of_it(dtype: torch.dtype, adapter: Path, store: Store) -> None:
    model = load_model(find_model(ModelSettings(path=str(adapter)), store), dtype)
    first = logits(model)
    wrapped = add_lora(model, TuningSettings(lora_rank=2, lora_dropout=0.0), seed=0)
    assert torch.equal(logits(wrapped), first)  # fresh matrices change nothing, and the ones beneath are there
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    both = logits(wrapped)
    wrapped(input_ids=IDS).logits.sum().backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    scorer = without_gradients(wrapped)
    assert not [name for name, _ in scorer.named_parameters() if "lora_" in name]
    assert float((logits(scorer) - both).abs().mean()) < 0.05 * float((both - first).abs().mean())


def test_its_base_is_found_beside_it_or_where_the_user_says(base: Path, tmp_path: Path, store: Store) -> None:
    folder = save_adapter(base, tmp_path / "adapter")
    own = find_model(ModelSettings(path=str(folder)), store)
    config = json.loads((folder / "adapter_config.json").read_text())
    shutil.copytree(base, tmp_path / "beside")
    for named, given in (("../beside", None), ("gone/away", str(base))):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        found = find_model(ModelSettings(path=str(folder), base=given), store)
        assert (found.name, found.adapters) == ("adapter", (folder,))
        assert found.base is not None
        assert own.base is not None
        assert found.base["sha256"] == own.base["sha256"]


@pytest.mark.parametrize("named", ["gone/away", "../gone", None])
def test_a_base_that_is_not_there_is_one_clear_line(
    named: str | None, base: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = save_adapter(base, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
    with pytest.raises(UserError, match=r"an adapter whose base model .*cannot be had .*set model\.base") as caught:
        find_model(ModelSettings(path=str(folder)), store)
    assert "\n" not in str(caught.value)


def test_a_folder_with_model_and_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path, store: Store) -> None:
    """transformers would put the adapter onto the model without a word."""
    folder = tmp_path / "both"
    shutil.copytree(base, folder)
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, folder)
    with pytest.raises(UserError, match="holds both a model and an adapter"):
        find_model(ModelSettings(path=str(folder)), store)


def test_every_byte_of_the_adapter_counts(base: Path, adapter: Path, tmp_path: Path, store: Store) -> None:
    sources = [
        find_model(ModelSettings(path=str(path)), store)
        for path in (base, adapter, save_adapter(base, tmp_path / "other", seed=1))
    ]
    assert len({source.digest for source in sources}) == 3


def test_an_adapter_of_another_kind_needs_float32(base: Path, tmp_path: Path, store: Store) -> None:
    source = find_model(ModelSettings(path=str(save_adapter(base, tmp_path / "dora", use_dora=True))), store)
    load_model(source, torch.float32)
    with pytest.raises(UserError, match=r"has more than LoRA matrices .*model\.dtype=float32"):
        load_model(source, torch.bfloat16)


def test_an_adapter_that_names_itself_is_one_clear_line(base: Path, tmp_path: Path, store: Store) -> None:
    folder = save_adapter(base, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../adapter"}))
    with pytest.raises(UserError, match=r"the adapter names itself.*; set model\.base to") as caught:
        find_model(ModelSettings(path=str(folder)), store)
    assert "\n" not in str(caught.value)


def test_a_base_for_what_is_no_adapter_is_refused(base: Path, store: Store) -> None:
    with pytest.raises(
        UserError, match=r"^model\.base=other: model\.path=.* is no adapter's folder; leave model\.base out"
    ):
        find_model(ModelSettings(path=str(base), base="other"), store)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_an_adapter(dtype: torch.dtype, base: Path, tmp_path: Path, store: Store) -> None:
    first = save_adapter(base, tmp_path / "first", seed=1)
    second = save_adapter(base, tmp_path / "second", seed=2)
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../first"}))
    source = find_model(ModelSettings(path=str(second)), store)
    assert source.adapters == (first, second)
    assert source.describe()["base_model"]["base_model"]["name"] == base.name
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    for folder in (first, second):
        plain = PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()
    found = load_model(source, dtype)
    off = float((logits(found) - logits(plain)).abs().mean())
    assert off < (1e-4 if dtype == torch.float32 else 0.05 * float((logits(plain) - before).std()))


def test_a_tokenizer_that_its_base_has_no_room_for_is_refused(base: Path, tmp_path: Path, store: Store) -> None:
    folder = save_adapter(base, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<extra {number}>" for number in range(9)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"the adapter's tokenizer has \d+ tokens, its base model only \d+; merge"):
        load_model(find_model(ModelSettings(path=str(folder)), store), torch.float32)


def test_the_adapter_of_a_run_of_ours_and_one_trained_on_it(base: Path, tmp_path: Path, store: Store) -> None:
    """A run's adapter names a local base model without its path; the run itself knows where it is."""
    write_records(tmp_path / "coreset.jsonl", 12, seed=1, edge_cases=False)
    words = [f"coreset.path={tmp_path / 'coreset.jsonl'}", "trainer=cpu", "logger=none", "train.learning_rate=1e-2"]
    model = ["model=hf", "model.dtype=float32"]
    run_train(*model, f"model.path={base}", *words, output_dir=tmp_path / "one", store_dir=tmp_path / "store")
    first = tmp_path / "one" / "adapter"
    found = find_model(ModelSettings(path=str(first)), store)
    assert (found.directory, found.adapters) == (base, (first,))
    run = run_train(
        *model, f"model.path={base}", f"train.model={first}", *words, output_dir=tmp_path / "two",
        store_dir=tmp_path / "store",
    )  # fmt: skip
    assert (
        run.manifest["inputs"]["trainee"]["base_model"]["sha256"] == find_model(ModelSettings(str(base)), store).digest
    )
    second = tmp_path / "two" / "adapter"
    stacked = find_model(ModelSettings(path=str(second)), store)
    assert (stacked.directory, stacked.adapters) == (base, (first, second))
    load_model(stacked, torch.float32)
    changed = first / "adapter_config.json"
    text = changed.read_text()
    changed.write_text(text + "\n")
    with pytest.raises(
        UserError, match=r"its base model adapter has changed since .*; set model\.base to the one to use"
    ):
        find_model(ModelSettings(path=str(second)), store)
    changed.write_text(text)
    # a folder that is taken out of its run names nothing that could be found: the user says it
    moved = shutil.copytree(first, tmp_path / "moved" / "adapter")
    with pytest.raises(UserError, match=r"set model\.base to its directory or Hub id"):
        find_model(ModelSettings(path=str(moved)), store)
    given = find_model(ModelSettings(path=str(moved), base=str(base)), store)
    assert given.digest == found.digest
    trained = [f"train.model={moved}", f"train.base={base}", "model=hf", f"model.path={base}", "model.dtype=float32"]
    again = run_train(*trained, *words, output_dir=tmp_path / "three", store_dir=tmp_path / "store")
    assert again.manifest["inputs"]["trainee"]["sha256"] == given.digest


def test_its_own_tokenizer_is_taken(base: Path, adapter: Path, tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "with_tokenizer"
    shutil.copytree(adapter, folder)
    source = find_model(ModelSettings(path=str(folder)), store)
    assert source.tokenizer_directory == source.directory
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)
    assert replace(source).tokenizer_directory == folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_selection_and_a_training_with_it(dtype: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "pool.jsonl", 24, seed=1, edge_cases=False)
    write_records(tmp_path / "targets.jsonl", 4, seed=2, edge_cases=False)
    words = [
        "model=hf", f"model.path={adapter}", f"model.dtype={dtype}", "pool=jsonl",
        f"pool.path={tmp_path / 'pool.jsonl'}", "target=jsonl",
        f"target.path={tmp_path / 'targets.jsonl'}", "selection.count=6", "saliency.num_layers=2",
        "trainer=cpu", "logger=none", "warmup.fraction=0.3", "warmup.learning_rate=1e-2",
    ]  # fmt: skip
    store = tmp_path / "store"
    held_out = [f"evaluation.path={tmp_path / 'targets.jsonl'}", "evaluation.exact_match=never", "train.epochs=1"]
    run = run_train(*words, *held_out, output_dir=tmp_path / "run", store_dir=store)
    for role in ("trainee",):
        described = run.manifest["inputs"][role]
        assert described["name"] == "tuned"
        assert described["base_model"]["name"] == base.name
    assert run.metrics["eval/nll"] != run.metrics["eval/nll_before"]
    plain = run_select(*words, f"model.path={base}", output_dir=tmp_path / "plain", store_dir=store)
    selections = [folder / "scores.parquet" for folder in (plain, tmp_path / "run" / "selection")]
    assert selections[0].read_bytes() != selections[1].read_bytes()
    assert str(tmp_path) not in (tmp_path / "run" / "manifest.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_output_changes_no_embedding_that_shares_its_weights(
    tied: bool, dtype: torch.dtype, base: Path, tmp_path: Path, store: Store
) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, tie_word_embeddings=tied))
    shutil.copytree(base, tmp_path / "base")
    plain.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "lm_head"]
    folder = save_adapter(tmp_path / "base", tmp_path / "on_output", target_modules=targets)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    expected = logits(PeftModel.from_pretrained(loaded, str(folder)))
    found = logits(load_model(find_model(ModelSettings(path=str(folder)), store), dtype))
    assert float((found - expected).abs().mean() / expected.abs().mean()) < (1e-4 if dtype == torch.float32 else 0.05)


def test_other_adapters_than_lora_are_refused_by_their_name(base: Path, tmp_path: Path, store: Store) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "ia3")
    source = find_model(ModelSettings(path=str(tmp_path / "ia3")), store)
    with pytest.raises(UserError, match="is of the kind IA3; only LoRA is taken"):
        load_model(source, torch.float32)
