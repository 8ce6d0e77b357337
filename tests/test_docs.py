"""The documentation is true: pages, links, commands, keys, tables and snippets are held against the code."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.numpy import load_file

import trim_lightning.api
import trim_lightning.methods
from composing import compose_settings
from running import run_select
from tiny_models import build_tiny_model, write_records
from trim_lightning.cli.reference import COMMAND, reference_page
from trim_lightning.methods.base import load_selector
from trim_lightning.pipeline.checks import check_settings
from trim_lightning.records.generated_pool import FAMILIES
from trim_lightning.records.sources import open_records
from trim_lightning.settings.compose import SCHEMAS, config_directory
from trim_lightning.settings.key import known_keys
from trim_lightning.settings.schema import PoolSettings, TrainSettings
from trim_lightning.store import Store

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "trim_lightning"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BASE = (
    "model=hf", "model.dtype=float32", "pool=jsonl", "target=jsonl", "target.num_examples=3", "warmup.epochs=1",
    "saliency.num_layers=3", "max_length=128", "selection.count=5", "logger=none", "trainer=cpu",
)  # fmt: skip
TYPES = {
    "float": "float32",
    "list<element: int32>": "list of int32",
    "list<element: bool>": "list of bool",
    "list<element: float>": "list of float32",
}


@dataclass(frozen=True)
class Block:
    """One fenced code block of a page."""

    language: str
    info: str
    text: str


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*) ?([^\n]*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [Block(*parts) for parts in found]


def prose_of(page: Path) -> str:
    """A page without its fenced and indented code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def spans_of(page: Path) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`\n]+)`", prose_of(page))


def table_under(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without the head of the table."""
    section = (ROOT / "docs" / page).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    assert section, f"{page} has no section {heading}"
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), section[section.index("|") :].splitlines()))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# the reference page, links and tables


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference_page(), f"docs/configuration.md is out of date: run {COMMAND}"


def test_the_reference_page_has_every_key_and_option() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    keys = [name for name, *_ in known_keys(TrainSettings) if name not in ("method", "trainer")]
    options = [
        f"{file.parent.name}={file.stem}"
        for file in config_directory().glob("*/*.yaml")
        if file.parent.name != "hydra"  # Hydra's own, about its directories and its help
    ]
    assert [name for name in keys if f"\n| `{name}` |" not in page] == []
    assert [name for name in options if f"\n| `{name}`" not in page] == []


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", link):
            continue  # another site: not for a test without a network
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors_of(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_tables_are_whole(page: Path) -> None:
    lines = prose_of(page).splitlines()
    for _, table in itertools.groupby(lines, key=lambda line: line.startswith("|")):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table if line.startswith("|")}
        assert len(widths) <= 1, "a table has rows of different width"


# commands and keys

PROGRAM = re.compile(r"(?:\w+=\S+ )*(?:trim-(select|train)|(?:\S*/)?python3? (select|train)\.py)(?= |$)(?! init )")


def commands_of(page: Path) -> list[str]:
    """Every selection or training command on a page, in code blocks and in the text; `trim-select init` is none."""
    lines = re.sub(r"\\\n\s*", "", page.read_text()).splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines] + spans_of(page)
    return [line for line in lines if PROGRAM.match(line)]


def compositions(command: str) -> Iterator[list[str]]:
    """The overrides of a command; of a sweep, enough combinations to meet every value."""
    words = shlex.split(command[PROGRAM.match(command).end() :], comments=True)  # type: ignore[union-attr]
    words = [word for word in words if word not in ("…", "...")]
    if "--cfg" in words:
        del words[words.index("--cfg") + 1]
    overrides = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in overrides
    ]
    for place in range(max(map(len, choices), default=1)):
        yield [choice[place % len(choice)] for choice in choices]


@pytest.mark.parametrize(
    ("page", "command"), [(page, command) for page in PAGES for command in commands_of(page)], ids=str
)
def test_commands_compose(page: Path, command: str) -> None:
    name = next(filter(None, PROGRAM.match(command).groups()))  # type: ignore[union-attr]
    if "hparams_search=optuna" in command:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    if "model.quantize=" in command:
        pytest.importorskip("bitsandbytes")
    for overrides in compositions(command):
        directory = [] if any("output_dir" in override for override in overrides) else ["paths.output_dir=unused"]
        settings = compose_settings(name, SCHEMAS[name], [*overrides, *directory])
        check_settings(settings)
        load_selector(settings.method)


def test_the_collector_of_commands_sees_them() -> None:
    assert "trim-select --help" in commands_of(ROOT / "docs" / "index.md")
    assert list(compositions("A=b trim-select -m pooler=mean,max seed=1 # why")) == [
        ["pooler=mean", "seed=1"],
        ["pooler=max", "seed=1"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_keys_and_options_that_pages_name_exist(page: Path) -> None:
    keys = {name for name, *_ in known_keys(TrainSettings)}
    free = tuple(f"{name}." for name, _, default in known_keys(TrainSettings) if isinstance(default, dict))
    groups = {name.partition(".")[0] for name in keys if "." in name}
    files = ("jsonl", "gz", "parquet", "py", "yaml", "md", "html")
    for span in spans_of(page):
        name = span.lstrip("+").partition("=")[0]
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name) and name.partition(".")[0] in groups:
            known = name in keys or name.startswith(free) or name.rpartition(".")[2] in files
            assert known, f"{span}: no such key"
        option = re.fullmatch(r"([a-z_]+)=(\w+)", span)
        if option and (config_directory() / option[1]).is_dir():
            assert (config_directory() / option[1] / f"{option[2]}.yaml").is_file(), f"{span}: no such option"


# what a run writes, and what it reads again


@pytest.fixture(scope="module")
def documented_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages assume it: a model, a pool, targets, and the finished selection ``run``."""
    folder = tmp_path_factory.mktemp("documented_folder")
    build_tiny_model("llama", folder / "model")
    write_records(folder / "pool.jsonl", 40, seed=1)
    write_records(folder / "targets.jsonl", 4, seed=2, edge_cases=False)
    write_records(folder / "grouped.jsonl", 4, seed=3, edge_cases=False, groups=("sums", "trips"))
    select_at(folder, "run", "scoring.save_token_scores=true", "logger=csv")
    return folder


def select_at(folder: Path, name: str, *overrides: str) -> Path:
    """Run a selection with the folder's files."""
    files = [f"model.path={folder}/model", f"pool.path={folder}/pool.jsonl", f"target.path={folder}/targets.jsonl"]
    return run_select(*BASE, *files, *overrides, output_dir=folder / name, store_dir=folder / "store")


def snippets() -> list[Any]:
    return [
        pytest.param(block, id=f"{page.name}-{place}")
        for page in PAGES
        for place, block in enumerate(blocks_of(page))
        if block.language == "python" and not block.info
    ]


@pytest.mark.parametrize("block", snippets())
def test_snippets_run(block: Block, documented_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str = "bundled:", **options: Any) -> trim_lightning.TrimScorer:
        """A model that a page names by its Hub id needs a network: the tiny one stands in."""
        return trim_lightning.api.load("model" if re.search("[/:]", path) else path, **options)

    monkeypatch.chdir(documented_folder)
    monkeypatch.setattr(trim_lightning, "load", load, raising=False)
    namespace: dict[str, Any] = {name: read_lines(documented_folder / f"{name}.jsonl") for name in ("pool", "targets")}
    exec(compile(block.text, "snippet", "exec"), namespace)
    results = [
        namespace[name] for name in ("scores", "coreset", "target", "records", "bank", "manifest") if name in namespace
    ]
    assert results
    assert all(len(result) > 0 for result in results)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def schema_of(file: Path) -> list[list[str]]:
    return [[f"`{field.name}`", TYPES.get(str(field.type), str(field.type))] for field in pq.read_schema(file)]


@pytest.mark.parametrize("name", ["scores.parquet", "target_tokens.parquet", "token_scores.parquet"])
def test_columns_are_as_documented(name: str, documented_folder: Path) -> None:
    documented = [line[:2] for line in table_under("outputs.md", name)]
    assert documented == schema_of(documented_folder / "run" / name)


def test_tensors_are_as_documented(documented_folder: Path) -> None:
    bank = load_file(documented_folder / "run" / "fingerprints.safetensors")
    shapes = {1: "[C]", 2: "[C, hidden]"}
    found = {f"`{name}`": f"{tensor.dtype} `{shapes[tensor.ndim]}`" for name, tensor in bank.items()}
    assert {line[0]: line[1] for line in table_under("outputs.md", "fingerprints.safetensors")} == found


def test_names_with_groups_are_as_documented(documented_folder: Path) -> None:
    directory = select_at(
        documented_folder, "groups", f"target.path={documented_folder}/grouped.jsonl", "target.group_field=subtask",
        "warmup=none", "scoring.save_token_scores=true",
    )  # fmt: skip
    assert pq.read_schema(directory / "scores.parquet").names[-2:] == ["score/sums", "score/trips"]
    columns = pq.read_schema(directory / "token_scores.parquet").names
    assert [name for name in columns if "/" in name] == [
        f"{kind}/{group}" for group in ("sums", "trips") for kind in ("similarity", "direct")
    ]
    bank = load_file(directory / "fingerprints.safetensors")
    assert {"sums/vectors", "trips/vectors"} <= set(bank)


def test_the_manifest_is_as_documented(documented_folder: Path) -> None:
    manifest = json.loads((documented_folder / "run" / "manifest.json").read_text())
    text = (ROOT / "docs" / "outputs.md").read_text()
    assert [line[0].strip("`") for line in table_under("outputs.md", "manifest.json")] == list(manifest)
    counts = re.findall(r"^\| `(\w+)` \|", text.partition("| count |")[2], flags=re.MULTILINE)
    assert counts == list(manifest["counts"])
    stages = re.search(r"\| `stages` \| (.*?), those", text)
    assert stages is not None
    assert re.findall(r"`(\w+)`", stages[1]) == list(manifest["stages"])
    described = text.partition("Each stage has")[2].partition("\n\n")[0]
    for record in manifest["stages"].values():
        assert all(f"`{name}`" in described for name in record)


def test_every_file_is_documented(documented_folder: Path) -> None:
    text = (ROOT / "docs" / "outputs.md").read_text()
    files = [path.name for path in (documented_folder / "run").iterdir()]
    assert len(files) >= 7
    assert [name for name in files if name not in text] == []


@pytest.mark.parametrize("line", table_under("store.md", "What a change makes run again"), ids=lambda line: line[0])
def test_a_change_computes_again_what_the_store_page_says(line: list[str], documented_folder: Path) -> None:
    change, stages = line
    expected = set(re.findall(r"`(\w+)`", stages))
    assert expected or stages == "nothing"
    before = entries(documented_folder / "store")
    select_at(documented_folder, "changed", change.strip("`"))
    assert {stage for stage, _ in entries(documented_folder / "store") - before} == expected


def entries(store: Path) -> set[tuple[str, str]]:
    """Stage and key of every finished result in a store."""
    return {(receipt.parent.parent.name, receipt.parent.name) for receipt in store.glob("*/*/entry.json")}


# data.md and architecture.md


def layouts() -> list[Any]:
    text = (ROOT / "docs" / "data.md").read_text()
    found = re.findall(r"^\| ([\w/]+) \| .* \| `(\{.*\})` \|$", text, re.MULTILINE)
    return [pytest.param(name, example, id=name) for name, example in found]


@pytest.mark.parametrize(("name", "example"), layouts())
def test_layout_examples_are_recognised(name: str, example: str, tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text(example)
    source = PoolSettings(source="jsonl", path=str(tmp_path / "pool.jsonl"))
    records = open_records(source, what="pool", seed=0, spool=Store(tmp_path / "store").spool)
    assert records.layout.name == name
    assert records.record(0).turns[-1].content == "5"


def test_data_page_shows_all_layouts_and_counts_the_families() -> None:
    assert len(layouts()) == 21
    page = (ROOT / "docs" / "data.md").read_text()
    assert f"{len(FAMILIES)} task families with {PoolSettings().per_family} records each" in page


def test_the_method_of_the_architecture_page_works(
    documented_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {block.info: block.text for block in blocks_of(ROOT / "docs" / "architecture.md") if block.info}
    module = files["file=src/trim_lightning/methods/shortest.py"]
    option = files["file=conf/method/shortest.yaml"]
    (tmp_path / "shortest.py").write_text(module)
    monkeypatch.setattr(trim_lightning.methods, "__path__", [*trim_lightning.methods.__path__, str(tmp_path)])
    keys = yaml.safe_load(option)
    overrides = [f"method.{name}={value}" for name, value in keys.items()]
    table = pq.read_table(select_at(documented_folder, "shortest", *overrides) / "scores.parquet").to_pylist()
    scored = [record["num_scored"] for record in table if record["score"] is not None]
    assert min(scored) >= keys["least"]
    assert [record["num_scored"] for record in table if record["rank"] == 1] == [min(scored)]
    assert any(record["score"] is None for record in table)


def imports_of(file: Path) -> set[str]:
    """Full names of what a module imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_the_entry_points_see_a_dictconfig() -> None:
    seen = {file.name for file in PACKAGE.rglob("*.py") if "omegaconf.DictConfig" in imports_of(file)}
    assert seen == {"hydra_app.py", "compose.py"}


def test_trim_imports_nothing_of_the_package_outside_itself() -> None:
    names = set().union(*map(imports_of, (PACKAGE / "trim").glob("*.py")))
    assert {name for name in names if name.startswith("trim_lightning")} <= {
        name for name in names if name.startswith("trim_lightning.trim.")
    }
    libraries = {name.partition(".")[0] for name in names}
    assert {"torch", "numpy"} <= libraries
    assert not libraries & {"lightning", "hydra", "omegaconf", "transformers", "tokenizers", "datasets", "peft"}


def test_modules_named_on_the_architecture_page_cover_the_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("[!_]*.py"))]
    assert [path.name for path in rooms if f"[`{path.name}/`]" not in page] == []
    assert importlib.util.find_spec("trim_lightning.cli.reference") is not None
