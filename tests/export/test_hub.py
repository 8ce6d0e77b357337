"""An export as a data set of the Hub: its card, its licence, and what is said without a network."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import yaml

from running import run_select
from tiny_models import build_tiny_model
from trim_lightning.cli.export import main
from trim_lightning.records.indexing import index
from trim_lightning.records.record_file import LineSource, ReadOptions
from trim_lightning.runs.card import hub_pool, licence_fields, licence_text, plain, stated_licences

LICENSED = [
    {"id": "a", "prompt": "one | two", "response": "1", "license": "Apache 2.0", "license_link": "https://example.org"},
    {"id": "b", "prompt": "three", "response": "3", "license": "Apache 2.0"},
]


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def licensed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished selection of two records that name their licence."""
    root = tmp_path_factory.mktemp("hub")
    build_tiny_model("llama", root / "model")
    return run_select(
        "model=hf", f"model.path={root / 'model'}", "pool=jsonl", f"pool.path={written(root / 'pool.jsonl', LICENSED)}",
        "method=random", "warmup=none", "logger=none", "trainer=cpu", "selection.fraction=1.0",
        output_dir=root / "run", store_dir=root / "store",
    )  # fmt: skip


class Hub:
    """Stands for `huggingface_hub.HfApi`, and notes what is asked of it."""

    def __init__(self, *, refusal: Exception | None = None, private: bool = True) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refusal, self.private = refusal, private

    def create_repo(self, name: str, **given: Any) -> Any:
        self.calls.append((name, given))
        if self.refusal is not None:
            raise self.refusal
        return types.SimpleNamespace(repo_id=name)

    def dataset_info(self, name: str) -> Any:
        return types.SimpleNamespace(private=self.private, card_data=None)

    def upload_folder(self, **given: Any) -> None:
        from huggingface_hub.utils import filter_repo_objects

        there = sorted(str(path.relative_to(given["folder_path"])) for path in Path(given["folder_path"]).rglob("*"))
        files = list(filter_repo_objects(there, allow_patterns=given.get("allow_patterns")))
        self.calls.append((given["repo_id"], {"repo_type": given["repo_type"], "files": files}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts such a Hub in the place of the real one."""

    def stand_in(**kind: Any) -> Hub:
        made = Hub(**kind)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
        return made

    return stand_in


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_dry_run_writes_what_would_be_pushed(licensed: Path, tmp_path: Path, hub: Any, capsys: Any) -> None:
    asked = hub()
    arguments = [str(licensed), "--push-to-hub", "me/mine", "--dry-run", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert asked.calls == []
    assert "dry run: nothing was pushed; this folder would be the private data set me/mine" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["README.md", "export.json", "messages.parquet", "scores.parquet"]
    head, text = card_of(tmp_path / "out")
    assert head["license"] == "apache-2.0"
    assert [config["data_files"] for config in head["configs"]] == ["messages.parquet", "scores.parquet"]
    assert head["size_categories"] == ["n<1K"]
    for line in ("| method | random |", "| pool | pool.jsonl, 2 records", "| seed | 0 |", "- Apache 2.0: 2 records"):
        assert line in text
    assert str(licensed.parent) not in (tmp_path / "out" / "README.md").read_text()
    table = pq.read_table(tmp_path / "out" / "messages.parquet").to_pylist()
    assert {(row["license"], row["license_link"]) for row in table} == {
        ("Apache 2.0", "https://example.org"), ("Apache 2.0", "")
    }  # fmt: skip


@pytest.mark.parametrize("name", ["messages", "alpaca", "sharegpt"])
def test_licences_go_with_the_records(licensed: Path, tmp_path: Path, name: str) -> None:
    assert main([str(licensed), "--format", name, "--output", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    assert [line["license"] for line in lines] == ["Apache 2.0"] * 2
    assert sorted(line["license_link"] for line in lines) == ["", "https://example.org"]  # one type in all lines


@pytest.mark.parametrize("public", [False, True])
def test_it_is_private_unless_asked(public: bool, licensed: Path, tmp_path: Path, hub: Any, capsys: Any) -> None:
    asked = hub(private=not public)
    arguments = [str(licensed), "--push-to-hub", "me/mine", "--format", "messages", "--output", str(tmp_path / "out")]
    assert main([*arguments, *["--public"] * public]) == 0
    (_, made), (name, sent) = asked.calls
    assert (made["private"], made["repo_type"], name, sent["repo_type"]) == (
        not public,
        "dataset",
        "me/mine",
        "dataset",
    )
    assert sent["files"] == ["README.md", "export.json", "messages.jsonl", "scores.jsonl"]
    assert f"({'public' if public else 'private'})" in capsys.readouterr().out


def test_nothing_else_in_the_folder_is_published(licensed: Path, tmp_path: Path, hub: Any) -> None:
    asked = hub()
    for name in ("secrets.txt", "notes/README.txt", "old/README.md.bak"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    arguments = [str(licensed), "--push-to-hub", "me/mine", "--format", "alpaca", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert asked.calls[-1][1]["files"] == [
        "README.md", "alpaca.jsonl", "dataset_info.json", "export.json", "scores.jsonl"
    ]  # fmt: skip


def test_what_stays_private_is_not_called_public(licensed: Path, tmp_path: Path, hub: Any, capsys: Any) -> None:
    hub(private=True)
    assert main([str(licensed), "--push-to-hub", "me/mine", "--public", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "(private)" in out
    assert "(public)" not in out
    assert "warning: --public: the data set was there already and stays private" in out


@pytest.mark.parametrize(
    ("noted", "found"),
    [("owner/na.me", "owner/na.me"), (None, None), ("squad", None), ("a/b/c", None), ("../data", None), (3, None)],
)
def test_only_what_a_run_noted_as_of_the_hub_is(noted: Any, found: str | None) -> None:
    pool = {"name": "squad", **({} if noted is None else {"hub": noted})}
    config = {"pool": {"source": "hub", "path": "data/squad", "revision": "v1"}}
    assert hub_pool({"config": config, "inputs": {"pool": pool}}) == found


def test_a_data_set_that_is_public_already_is_left_alone(licensed: Path, tmp_path: Path, hub: Any, capsys: Any) -> None:
    asked = hub(private=False)
    assert main([str(licensed), "--push-to-hub", "me/mine", "--output", str(tmp_path / "out")]) == 2
    assert "is there already and public" in capsys.readouterr().err
    assert len(asked.calls) == 1  # nothing was uploaded


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (httpx.ConnectError("[Errno -2] Name or service not known"), "the Hub cannot be reached ([Errno -2] Name or"),
        (OSError("Token is required"), "the Hub cannot be reached (Token is required)"),
    ],
)
def test_without_a_network_one_line_says_so(
    refusal: Exception, told: str, licensed: Path, tmp_path: Path, hub: Any, capsys: Any
) -> None:
    hub(refusal=refusal)
    assert main([str(licensed), "--push-to-hub", "me/mine", "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: --push-to-hub=me/mine: {told}")
    assert f"{tmp_path / 'out'} holds what is to be pushed" in line
    assert (tmp_path / "out" / "README.md").exists()


def test_offline_is_told_by_the_library_itself(licensed: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([str(licensed), "--push-to-hub", "me/mine", "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --push-to-hub=me/mine: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--push-to-hub", "no good"], "--push-to-hub=no good: "),
        (["--format", "jsonl", "--public"], "belong to --push-to-hub NAME"),
        (["--format", "jsonl", "--dry-run"], "belong to --push-to-hub NAME"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    arguments: list[str], told: str, licensed: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main([str(licensed), *arguments, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert not (tmp_path / "out").exists()


def licences(path: Path, *names: str | None) -> Any:
    given = [{"prompt": "p", "response": "r", **({"licence": name} if name else {})} for name in names]
    file = written(path / "pool.jsonl", given)
    return stated_licences(index(LineSource(file, label="pool", name="pool", what="pool"), ReadOptions()))


def test_what_the_head_of_the_card_says(tmp_path: Path) -> None:
    own = {"license": "odc-by", "license_name": None, "license_link": None}
    assert licence_fields(licences(tmp_path, None, None), {}) == {}
    assert licence_fields(licences(tmp_path, None, None), own) == {"license": "odc-by"}
    assert licence_fields(licences(tmp_path, "MIT", "MIT"), own) == {"license": "mit"}
    assert licence_fields(licences(tmp_path, "Ours, v2", "Ours, v2"), {}) == {
        "license": "other", "license_name": "ours-v2"
    }  # fmt: skip
    mixed = licences(tmp_path, "MIT", None, "GPL|3")
    assert licence_fields(mixed, {}) == {"license": "other", "license_name": "several"}
    text = licence_text(mixed, own)
    assert "- MIT: 1 records\n- none named: 1 records\n- GPL\\|3: 1 records" in text
    assert "The card of the pool says: odc-by." in text


def test_nothing_of_the_data_means_anything_in_the_card() -> None:
    assert plain("a|b <img>\n# c *d* [e](f) \u202e") == "a\\|b &lt;img&gt; \\# c \\*d\\* \\[e\\](f) ⟨U+202E⟩"


def test_sharegpt_reads_back(tmp_path: Path) -> None:
    from trim_lightning.errors import UserError
    from trim_lightning.runs.formats import write_sharegpt

    turns = [("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "t"), ("assistant", "b")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    file = written(tmp_path / "coreset.jsonl", [chat])

    def opened(path: Path) -> Any:
        return index(LineSource(path, label="x", name="x", what="pool"), ReadOptions())

    write_sharegpt(opened(file), file, tmp_path)
    (line,) = (tmp_path / "sharegpt.jsonl").read_text().splitlines()
    assert [turn["from"] for turn in json.loads(line)["conversations"]] == [
        "system", "human", "gpt", "observation", "gpt"
    ]  # fmt: skip
    assert opened(tmp_path / "sharegpt.jsonl").record(0).turns == opened(file).record(0).turns
    info = json.loads((tmp_path / "dataset_info.json").read_text())["trim_coreset"]
    assert info["formatting"] == "sharegpt"
    chat["messages"][2]["reasoning_content"] = "hm"
    with pytest.raises(UserError, match="ShareGPT cannot hold thoughts, calls or masks; use --format messages"):
        write_sharegpt(opened(written(tmp_path / "rich.jsonl", [chat])), file, tmp_path)
