"""Runs, pages and a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rooms import Room


@pytest.fixture(scope="session")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    """Built once for all tests of the pages."""
    return Room(tmp_path_factory.mktemp("room"))


@pytest.fixture(scope="session")
def plain(room: Room) -> Path:
    """A selection of 12 of 60 records, by kind."""
    return room.select("plain", "selection.count=12")


@pytest.fixture(scope="session")
def hostile(room: Room) -> Path:
    """A selection of everything hostile."""
    return room.select_hostile("hostile")


def find_chromium() -> str | None:
    """A Chromium of this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for found in map(shutil.which, names) if found), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; the tests that want one are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium on this machine: make browser installs it")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """A page opened from disk, with all that went wrong on it."""

    def __init__(self, browser: Any, path: Path, *, scheme: str, size: tuple[int, int]) -> None:
        self.context = browser.new_context(
            color_scheme=scheme, viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.troubles.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", lambda dialog: self.troubles.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_selector("html[data-ready=true]", state="attached", timeout=120_000)

    @property
    def foreign(self) -> list[str]:
        """Requests for anything but the page itself and what it holds."""
        return [url for url in self.requests[1:] if not url.startswith("data:")]


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """``visit(path)`` opens a page; at the end nothing may have gone wrong on it and nothing been fetched."""
    visits: list[Visit] = []

    def open_page(path: Path, scheme: str = "light", size: tuple[int, int] = (1280, 900)) -> Any:
        visits.append(Visit(browser, path, scheme=scheme, size=size))
        return visits[-1].page

    yield open_page
    troubles = [trouble for one in visits for trouble in [*one.troubles, *one.foreign]]
    for one in visits:
        one.context.close()
    assert troubles == []
