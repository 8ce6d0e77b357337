"""The site of the documentation: every page has its place, links lead somewhere, and it opens from disk alone."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rooms import Room
from test_browser import AXE, PHONE, SIZES

from trim_lightning.cli.compare import main as compare_main
from trim_lightning.cli.explain import main as explain_main

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "mkdocs.yml"
GENERATED = {"contributing.md", "changelog.md"}  # from the files at the root
SHOWN = ("index", "examples", "results/value", "python")


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without obeying its tags."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages_of(part)


def test_every_page_has_one_place() -> None:
    nav = yaml.load(CONFIG.read_text(), Loader)["nav"]
    assert [name for part in nav for name in part] == ["Start", "Guides", "Method and results", "Reference"]
    named = list(pages_of(nav))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(named) == sorted(pages | GENERATED)


def builder() -> str:
    """A Python with mkdocs: that of `make docs`, or this one."""
    own = ROOT / "build" / "docs" / "bin" / "python"
    if own.is_file():
        return str(own)
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed: make docs does it")
    return sys.executable


def build(*arguments: str | Path, examples: Path) -> subprocess.CompletedProcess[str]:
    command = [builder(), "-m", "mkdocs", "build", "--strict", *map(str, arguments)]
    environment = {**os.environ, "TRIM_EXAMPLES": str(examples), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def examples(room: Room) -> Path:
    """What `make docs` makes with the demo, of tiny runs."""
    folder = room.root / "examples"
    for place, method in enumerate(("trim", "random")):
        room.select(f"examples/runs/{place}", f"method={method}", "selection.count=6")
    assert compare_main([str(folder / "runs")]) == 0
    assert explain_main([str(folder / "runs" / "0"), "--row", "0", "--html", str(folder / "why.html")]) == 0
    return folder


@pytest.fixture(scope="module")
def site(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build("--site-dir", folder, examples=examples)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_whole_and_fetches_nothing(site: Path) -> None:
    for name in pages_of(yaml.load(CONFIG.read_text(), Loader)["nav"]):
        assert (site / name).with_suffix(".html").is_file()
    for name in ("runs/0/report.html", "runs/0/coreset.jsonl", "runs/compare.html", "why.html"):
        assert (site / "examples" / name).is_file()
    assert not list(site.rglob("local.json"))
    assert "TrimScorer" in (site / "python.html").read_text()
    assert (
        'id="trim_lightning.trim.pooling.pool"'
        in (site / "python" / "trim_lightning" / "trim" / "pooling.html").read_text()
    )
    pages = [page for page in site.rglob("*.html") if "examples" not in page.parts]
    assert len(pages) > 80
    foreign = re.compile(r'<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"')
    assert [(page.name, foreign.findall(page.read_text())) for page in pages if foreign.search(page.read_text())] == []


@pytest.mark.slow
def test_a_link_that_leads_nowhere_fails_the_build(examples: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[a page](nowhere.md) and [a heading](#none)\n")
    (tmp_path / "mkdocs.yml").write_text(
        f"INHERIT: {CONFIG}\nhooks: [{ROOT}/docs/site_hooks.py]\ndocs_dir: docs\nnav: [index.md]\nplugins: [search]\n"
    )
    built = build("--config-file", tmp_path / "mkdocs.yml", "--site-dir", tmp_path / "site", examples=examples)
    assert built.returncode != 0
    assert "nowhere.md" in built.stderr
    assert "#none" in built.stderr


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "size"), SIZES[:3])
def test_the_site_reads_well_from_disk(site: Path, browser: Any, scheme: str, size: tuple[int, int]) -> None:
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce"
    )
    page = context.new_page()
    troubles: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    for name in SHOWN:
        page.goto((site / f"{name}.html").as_uri())
        page.wait_for_load_state()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        folder = os.environ.get("TRIM_SCREENSHOTS")
        if folder:
            page.screenshot(path=Path(folder) / f"site-{name.replace('/', '-')}-{scheme}-{size[0]}.png")
        if AXE.is_file():
            assert serious_on(page) == [], name
    assert troubles == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "about:", "blob:"))] == []
    context.close()


def serious_on(page: Any) -> list[Any]:
    """What axe finds on a page, the pages within it left out: they have tests of their own."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations'], iframes: false})")
    return [
        (item["id"], [node["html"][:200] for node in item["nodes"][:3]])
        for item in found["violations"]
        if item["impact"] in ("serious", "critical")
    ]


@pytest.mark.slow
@pytest.mark.browser
def test_search_finds_without_a_server(site: Path, browser: Any) -> None:
    if not (site / "assets" / "iframe-worker.js").is_file():
        pytest.skip("iframe-worker is not here: make docs fetches it")
    page = browser.new_page(viewport={"width": PHONE[0] * 3, "height": PHONE[1]})
    page.goto((site / "index.html").as_uri())
    page.locator("input[name=query]").fill("saliency")
    page.locator(".md-search-result__link").first.wait_for(timeout=60_000)
    assert page.locator(".md-search-result__link").count() > 3
    page.close()
