"""Finding a model: what counts as one, what is refused and in which words, and when two are the same."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trim_lightning.errors import UserError
from trim_lightning.models.load import load_model, load_tokenizer
from trim_lightning.models.source import find_model, is_local
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.store import Store


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny model of the test's own."""
    return shutil.copytree(tiny_folder("llama"), tmp_path / "model")


def find_and_load(settings: ModelSettings, store: Store) -> None:
    source = find_model(settings, store)
    load_tokenizer(source)
    load_model(source, torch.float32)


def refusal(path: Path | str, store: Store, **settings: Any) -> str:
    """The one line that finding and loading this model gives."""
    with pytest.raises(UserError) as caught:
        find_and_load(ModelSettings(path=str(path), **settings), store)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


# ------------------------------------------------------------------------------------------------ found


def test_a_folder_is_found_and_described(folder: Path, store: Store) -> None:
    source = find_model(ModelSettings(path=str(folder)), store)
    assert (source.name, source.directory, source.num_layers, source.max_positions) == ("model", folder, 4, 512)
    assert (source.trust_remote_code, source.device_map, source.chat_template) == (False, None, None)
    model = load_model(source, torch.float32)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_tokenizer(source)("a").input_ids


def test_the_name_is_never_a_path(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for path in ("model", "./model", "model/", str(folder)):
        assert find_model(ModelSettings(path=path), store).name == "model"
    monkeypatch.chdir(folder)
    assert find_model(ModelSettings(path="."), store).name == "model"


@pytest.mark.parametrize(
    ("config", "layers", "positions"),
    [
        ({"n_layer": 3, "n_positions": 99}, 3, 99),
        ({"text_config": {"num_hidden_layers": 5, "max_position_embeddings": 7}}, 5, 7),
        ({"num_hidden_layers": 2, "text_config": None}, 2, None),
        ({"num_layers": 6, "max_position_embeddings": "many"}, 6, None),
    ],
)
def test_layers_and_positions_are_read_from_any_usual_config(
    config: dict[str, Any], layers: int, positions: int | None, folder: Path, store: Store
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    source = find_model(ModelSettings(path=str(folder)), store)
    assert (source.num_layers, source.max_positions) == (layers, positions)


def test_more_layers_than_there_are_is_refused_with_their_number(folder: Path, store: Store) -> None:
    source = find_model(ModelSettings(path=str(folder)), store)
    source.check_layers(4)
    with pytest.raises(UserError, match=r"saliency\.num_layers=5: model has only 4 layers; ask for at most 4"):
        source.check_layers(5)


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("gpt2", False),
        ("owner/name", False),
        ("./owner", True),
        ("../x", True),
        ("/data/model", True),
        ("~/model", True),
        ("a/b/c", True),
    ],
)
def test_what_is_a_path_and_what_a_hub_id(path: str, local: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_local(path) is local
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_local("owner/name")


# --------------------------------------------------------------------------------------------- identity


def digest(folder: Path, store: Store, **settings: Any) -> str:
    return find_model(ModelSettings(path=str(folder), **settings), store).digest


def test_two_copies_of_one_model_share_a_digest(folder: Path, store: Store, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "another name")
    (copy / "README.md").write_text("where I got it")
    (copy / "entry.json").write_text("a note of the store's own")
    (copy / "optimizer").mkdir()
    assert digest(copy, store) == digest(folder, store) == digest(folder, Store(tmp_path / "other store"))


@pytest.mark.parametrize("change", ["weights", "config", "tokenizer", "template"])
def test_any_change_of_what_a_model_is_changes_the_digest(change: str, folder: Path, store: Store) -> None:
    before = digest(folder, store)
    if change == "weights":
        tensors = load_file(folder / "model.safetensors")
        name = sorted(tensors)[0]
        tensors[name].view(-1)[0] += 1e-3
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "config":
        edit_config(folder, rms_norm_eps=1e-3)
    elif change == "tokenizer":
        with (folder / "tokenizer.json").open("a") as file:
            file.write("\n")
    else:
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert digest(folder, store) != before


def test_code_is_part_of_a_model_that_may_run_it(folder: Path, store: Store) -> None:
    code = folder / "modeling.py"
    code.write_text("one = 1\n")
    plain, trusted = digest(folder, store), digest(folder, store, trust_remote_code=True)
    code.write_text("one = 2\n")
    assert digest(folder, store) == plain
    assert digest(folder, store, trust_remote_code=True) != trusted


# --------------------------------------------------------------------------------------------- refusals


def test_what_is_no_model_directory_is_refused(folder: Path, store: Store, tmp_path: Path) -> None:
    where = f"model.path={tmp_path}/nowhere"
    assert refusal(tmp_path / "nowhere", store).startswith(f"{where}: no such directory; give a model directory")
    assert "is a file; give the directory" in refusal(folder / "config.json", store)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is no model directory (it has no config.json)" in refusal(empty, store)
    (empty / "config.json").mkdir()
    assert "is no model directory (it has no config.json)" in refusal(empty, store)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\x00", "[" * 100_000])
def test_a_broken_config_is_refused(content: str, folder: Path, store: Store) -> None:
    (folder / "config.json").write_text(content)
    assert "config.json is not" in refusal(folder, store)


def test_a_config_without_layers_is_refused(folder: Path, store: Store) -> None:
    edit_config(folder, num_hidden_layers=None)
    assert "model/config.json does not say how many layers the model has" in refusal(folder, store)


def test_pickled_weights_are_never_read(folder: Path, store: Store) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no *.safetensors weights" in refusal(folder, store)
    for name in ("pytorch_model.bin", "consolidated.00.pt"):
        torch.save({}, folder / name)
        message = refusal(folder, store)
        assert "only pickled weights, which can run code when loaded; save the model again" in message
        (folder / name).unlink()


def test_pickled_weights_beside_other_safetensors_are_not_read_either(folder: Path, store: Store) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "something_else.safetensors")
    assert refusal(folder, store).startswith("model.path=model: cannot be loaded (")


def test_a_model_that_wants_to_run_its_own_code_is_refused(folder: Path, store: Store) -> None:
    marker = folder.parent / "ran"
    (folder / "modeling.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"})
    assert "(auto_map); set model.trust_remote_code=true if you trust it" in refusal(folder, store)
    edit_config(folder, auto_map=None)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["modeling.Slow", "modeling.Fast"]}, "tokenizer_class": "Odd"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with contextlib.suppress(UserError):  # refused or read without its code, as transformers sees fit
        load_tokenizer(find_model(ModelSettings(path=str(folder)), store))
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "no weight", "wrong shape"])
def test_damaged_or_incomplete_weights_are_refused(damage: str, folder: Path, store: Store) -> None:
    path = folder / "model.safetensors"
    if damage in ("cut", "empty"):
        os.truncate(path, 1000 if damage == "cut" else 0)
    else:
        tensors = load_file(path)
        name = "model.layers.1.self_attn.q_proj.weight"
        if damage == "no weight":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:5].clone()
        save_file(tensors, path, metadata={"format": "pt"})
    message = refusal(folder, store)
    assert message.startswith("model.path=model: ")
    if damage == "no weight":
        assert "weights are missing from its safetensors files (model.layers.1.self_attn.q_proj.weight" in message


def test_an_unknown_architecture_and_a_missing_tokenizer_are_refused(folder: Path, store: Store) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert refusal(folder, store).startswith("model.path=model: its tokenizer cannot be loaded (")
    edit_config(folder, model_type="nothing", architectures=["NothingForCausalLM"])
    with pytest.raises(UserError, match=r"^model\.path=model: cannot be loaded \("):
        load_model(find_model(ModelSettings(path=str(folder)), store), torch.float32)


def test_a_chat_template_file_is_read_or_refused(folder: Path, store: Store, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }} é", encoding="utf-8")
    source = find_model(ModelSettings(path=str(folder), chat_template=str(template)), store)
    assert source.chat_template == "{{ messages }} é"
    template.write_bytes(b"\xff\xfe\x00")
    for path in (template, tmp_path / "none.jinja", tmp_path):
        assert f"model.chat_template={path}: cannot be read" in refusal(folder, store, chat_template=str(path))


# ------------------------------------------------------------------------------------- without a network

OFFLINE = """
import sys
from trim_lightning.errors import UserError
from trim_lightning.models.source import find_model
from trim_lightning.settings.schema import ModelSettings
from trim_lightning.store import Store

for path in sys.argv[2:]:
    try:
        find_model(ModelSettings(path=path), Store(sys.argv[1]))
    except UserError as error:
        print(error)
assert not {"torch", "transformers"} & set(sys.modules), "finding a model must not import torch"
"""


def test_a_hub_model_without_a_network_gives_one_clear_line(tmp_path: Path) -> None:
    paths = ["nobody/no-model", "gpt-nothing", "two words", "bad--/name..x"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path / "store"), *paths],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    for path, line in zip(paths[:2], lines[:2], strict=True):
        assert line.startswith(f"model.path={path}: not on this disk, and the Hub cannot be reached")
        assert "model=smollm2_135m, which needs no network" in line
    for path, line in zip(paths[2:], lines[2:], strict=True):
        assert line == f"model.path={path}: neither a directory nor a Hub id (owner/name)"
