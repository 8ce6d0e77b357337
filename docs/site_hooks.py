"""What `make docs` does beside mkdocs: the pages link into the repository, and on the site those files are pages too.

A module of the package gets the reference made from its docstrings, any other file its text. So the site opens from
disk, is whole, and a link that leads nowhere fails the build.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PACKAGE = ROOT / "src" / "trim_lightning"
API = (PACKAGE / "api.py", PACKAGE / "selection" / "scores.py", PACKAGE / "report" / "in_memory.py")  # on one page
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
FILE_NAME = re.compile(r"\[([a-z_]+)\.md\]\(")  # on the site a page is no file
LIVE = re.compile(r"^<!-- live: (\S+) \| (.+) -->$", re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".js": "js", ".css": "css"}
SHOWN = (".csv", ".html", ".json", ".jsonl", ".parquet", ".safetensors")
FENCE = "`" * 8


def on_files(files: Any, config: Any) -> Any:
    """Add pages for the files that pages link to, and the live examples."""
    pages = [*(DOCS / file.src_uri for file in files.documentation_pages()), *(ROOT / name for name in ROOT_PAGES)]
    linked = {target for page in pages for target in targets_of(page)}
    for path in sorted({*linked, *pages}):
        if path.exists() and path not in API and not path.is_relative_to(DOCS):
            files.append(File.generated(config, uri_of(path), content=text_of(path)))
    examples = ROOT / config.extra["examples"]
    shown = {path.relative_to(examples).as_posix(): path for path in examples.rglob("*") if is_shown(path)}
    for page in pages:
        for name, _ in LIVE.findall(page.read_text(encoding="utf-8")):
            if name not in shown:
                raise PluginError(f"{examples / name} is not there: run `make docs`, which makes the examples first")
    for name, path in shown.items():
        files.append(File.generated(config, f"examples/{name}", abs_src_path=str(path)))
    shim = ROOT / "build" / "docs" / "node_modules" / "iframe-worker" / "shim" / "index.js"
    if shim.is_file():
        files.append(File.generated(config, "assets/iframe-worker.js", abs_src_path=str(shim)))
    else:
        config.extra["polyfills"] = []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the site's pages, show the live examples, and add the reference to the page of Python."""
    uri = page.file.src_uri
    origin = DOCS / uri
    if page.file.generated_by is not None:
        origin = ROOT / next((name for name in ROOT_PAGES if name.lower() == uri), uri.removeprefix("source/")[:-3])
        if origin.suffix not in (".md", ".ipynb"):
            return markdown
    if uri == "python.md":
        markdown += "\n## Reference\n\n" + "\n".join(map(reference, API))

    def site_link(match: re.Match[str]) -> str:
        target = (origin.parent / match[1]).resolve()
        return posixpath.relpath(uri_of(target), posixpath.dirname(uri) or ".") if target.exists() else match[1]

    return LIVE.sub(frame, FILE_NAME.sub(r"[\1](", LINK.sub(site_link, markdown)))


def on_post_page(output: str, **_: Any) -> str:
    """Name the theme's search dialog, for those who hear the page."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"', 1)


def is_shown(path: Path) -> bool:
    """True for what an example's pages link to; a run's ``local.json`` holds paths of this machine."""
    return path.is_file() and path.suffix in SHOWN and path.name != "local.json"


def frame(match: re.Match[str]) -> str:
    """A page within the page."""
    return (
        f'<iframe class="live" src="examples/{match[1]}" title="{match[2]}" loading="lazy"></iframe>\n\n'
        f'<a href="examples/{match[1]}">{match[2]}, alone</a>'
    )


def targets_of(page: Path) -> Iterator[Path]:
    """What a page's links lead to."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        yield (page.parent / link).resolve()


def uri_of(path: Path) -> str:
    """Where a file of the repository is on the site, as a Markdown source."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if path.name in ROOT_PAGES:
        return path.name.lower()
    if path in API:
        return "python.md"
    if path == ROOT / "README.md":
        return "index.md"
    place = path.relative_to(ROOT).as_posix()
    return f"python/{module_of(path).replace('.', '/')}.md" if is_module(path) else f"source/{place}.md"


def is_module(path: Path) -> bool:
    """True for what the reference is made from."""
    return path.is_relative_to(PACKAGE) and path.suffix == ".py"


def module_of(path: Path) -> str:
    """The module's name."""
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)


def reference(path: Path) -> str:
    """What makes a module's reference."""
    return f"::: {module_of(path)}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"


def text_of(path: Path) -> str:
    """A page for a file or a folder of the repository."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    place = path.relative_to(ROOT).as_posix()
    if is_module(path):
        return f"---\nsearch:\n  boost: 0.5\n---\n\n# {module_of(path)}\n\n{reference(path)}"
    if path.suffix == ".ipynb":
        return "\n\n".join(map(cell_text, json.loads(path.read_text(encoding="utf-8"))["cells"])) + "\n"
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {place}\n\n"
    if path.is_dir():
        parts = (file for file in sorted(path.iterdir()) if file.is_file())
        return head + "\n".join(part_of(file) for file in parts)
    return head + fenced(path)


def cell_text(cell: Mapping[str, Any]) -> str:
    """A cell of a notebook, which is kept without what it showed."""
    text = "".join(cell["source"])
    return text if cell["cell_type"] == "markdown" else f"{FENCE}python\n{text}\n{FENCE}"


def part_of(file: Path) -> str:
    """A file of a folder: its text if it is a short one, else its size."""
    size = os.path.getsize(file)
    return f"## {file.name}\n\n" + (fenced(file) if size < 40_000 else f"{size:,} bytes\n")


def fenced(path: Path) -> str:
    """A file's text as code."""
    return f"{FENCE}{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}\n{FENCE}\n"
