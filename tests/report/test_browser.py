"""The pages in a real browser, opened from disk: nothing fetched, nothing broken, everything works."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from rooms import HOSTILE, Room, large_facts

from trim_lightning.cli.compare import main as compare_main
from trim_lightning.cli.explain import main as explain_main
from trim_lightning.pipeline.select import select
from trim_lightning.report.selection_page import selection_page

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.browser

AXE = Path(__file__).resolve().parents[2] / "build" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
PHONE = (390, 844)
SIZES = [("light", (1280, 900)), ("dark", (1280, 900)), ("light", PHONE), ("dark", PHONE)]


@pytest.fixture(scope="module")
def comparison(room: Room) -> Path:
    """A comparison of six runs."""
    for place, (method, count) in enumerate(
        (method, count) for method in ("trim", "random", "longest") for count in (6, 12)
    ):
        room.select(f"browsed/{place}", f"method={method}", f"selection.count={count}")
    assert compare_main([str(room.root / "browsed")]) == 0
    return room.root / "browsed" / "compare.html"


@pytest.fixture(scope="module")
def explained(room: Room, hostile: Path) -> Path:
    """One record as a page."""
    path = room.root / "explained.html"
    assert explain_main([str(hostile), "--row", "0", "--html", str(path)]) == 0
    return path


@pytest.fixture(params=["report", "hostile", "comparison", "explained"])
def any_page(request: pytest.FixtureRequest, plain: Path, hostile: Path, comparison: Path, explained: Path) -> Path:
    """Each kind of page."""
    pages = {"report": plain / "report.html", "hostile": hostile / "report.html", "comparison": comparison,
             "explained": explained}  # fmt: skip
    found: Path = pages[request.param]
    return found


@pytest.mark.parametrize(("scheme", "size"), SIZES)
def test_pages_open_without_network_errors_or_sideways_scrolling(
    any_page: Path, visit: Any, scheme: str, size: tuple[int, int]
) -> None:
    page = visit(any_page, scheme, size)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) > 380
    assert light == (scheme == "light")
    folder = os.environ.get("TRIM_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(
            path=Path(folder) / f"{any_page.parent.name}-{any_page.stem}-{scheme}-{size[0]}.png", full_page=True
        )


@pytest.mark.parametrize(("scheme", "size"), [("light", (1280, 900)), ("dark", (1280, 900)), ("light", PHONE)])
def test_axe_finds_no_serious_violation(any_page: Path, visit: Any, scheme: str, size: tuple[int, int]) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not here: make browser fetches it")
    page = visit(any_page, scheme, size)
    # opened parts are checked too
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    page.wait_for_timeout(100)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    serious = [
        (item["id"], item["help"], [node["html"][:200] for node in item["nodes"][:3]])
        for item in found["violations"]
        if item["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_charts_are_drawn_with_a_text_alternative(plain: Path, visit: Any) -> None:
    page = visit(plain / "report.html")
    for name in ("scores", "lengths"):
        chart = page.locator(f"#chart-{name} svg[role=img]")
        assert chart.count() == 1
        assert "Mean" in chart.get_attribute("aria-label")
        assert chart.locator("path, rect").count() > 5
        assert page.locator(f"figure:has(#chart-{name}) details table").count() == 1
    assert "cut" in page.locator("#chart-scores svg").text_content()


def test_charts_fit_a_window_that_changes(plain: Path, visit: Any) -> None:
    page = visit(plain / "report.html")
    page.set_viewport_size({"width": 500, "height": 900})
    expect(page.locator("#chart-scores svg")).to_have_attribute("width", re.compile(r"^[1-4]\d\d$"))


def test_the_signal_can_be_switched(plain: Path, visit: Any) -> None:
    page = visit(plain / "report.html")
    data = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
    target, top = data["targets"][0], data["top"]

    def tints() -> list[float]:
        tokens = "[...document.querySelector('#target-views .view').querySelectorAll('.tok.sal')]"
        found: list[float] = page.evaluate(f"{tokens}.map((token) => Number(token.style.getPropertyValue('--v')))")
        return found

    for label, key in (("combined", "s"), ("row", "r"), ("column", "c")):
        page.locator("#signal").get_by_text(label, exact=True).click()
        known = [value / top for value in target[key] if value is not None]
        assert tints() == pytest.approx(known, abs=1e-3)


def test_tips_show_the_best_target_token_on_hover_and_focus(plain: Path, visit: Any) -> None:
    page = visit(plain / "report.html")
    tip = page.locator("#tip")
    assert tip.is_hidden()
    token = page.locator("#candidate-views .tok:not(.off)").first
    token.scroll_into_view_if_needed()
    # scrolling closes a tip, a frame later
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    token.hover()
    assert tip.is_visible()
    assert "similarity" in tip.text_content()
    assert "best target token" in tip.text_content()
    assert tip.locator("mark").count() >= 1
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.mouse.move(0, 0)
    token.focus()
    assert tip.is_visible()
    first = tip.text_content()
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert tip.text_content() != first
    page.keyboard.press("Home")
    assert tip.text_content() == first
    page.keyboard.press("Tab")
    assert tip.is_hidden() or tip.text_content() != first


def test_each_token_view_is_one_stop_of_the_tab_key(plain: Path, visit: Any) -> None:
    page = visit(plain / "report.html")
    stops = page.evaluate(
        "[...document.querySelectorAll('.tokens')].map((view) => view.querySelectorAll('[tabindex=\"0\"]').length)"
    )
    assert stops
    assert set(stops) <= {0, 1}


def test_top_borderline_and_bottom(plain: Path, visit: Any) -> None:
    page = visit(plain / "report.html")
    names = page.locator("#candidate-views .rank")
    assert names.first.text_content() == "#1"
    page.locator("#which").get_by_text("borderline").click()
    assert names.first.text_content() == "#9"
    assert page.locator("#candidate-views .badge.out").count() == 4
    page.locator("#which").get_by_text("bottom").click()
    assert page.locator("#candidate-views .badge:not(.out)").count() == 0
    page.locator("#candidate-views details:not([open]) summary").first.click()
    expect(page.locator("#candidate-views .tokens")).to_have_count(4)


def test_direct_and_fallback_are_told_apart_without_colour(plain: Path, visit: Any) -> None:
    page = visit(plain / "report.html")
    style = "getComputedStyle(document.querySelector('#candidate-views .tok.{}')).borderBottomStyle"
    page.locator("#which").get_by_text("bottom").click()
    assert page.evaluate(style.format("d")) == "solid"
    assert page.evaluate(style.format("f")) == "dotted"


def test_search_and_paging(room: Room, visit: Any) -> None:
    facts = select(room.settings(room.root / "searched", "selection.count=12")).report
    assert facts is not None
    path = room.root / "searched.html"
    path.write_text(selection_page(large_facts(facts, 2000)), encoding="utf-8")
    page = visit(path)
    items, where, found = page.locator("#records > li"), page.locator("#page"), page.locator("#found")
    assert items.count() == 20
    assert where.text_content() == "page 1 of 100"
    assert page.locator("#previous").is_disabled()
    page.locator("#next").click()
    assert where.text_content() == "page 2 of 100"
    assert items.first.locator(".name").text_content() == "record-20"
    page.locator("#last").click()
    assert items.last.locator(".name").text_content() == "record-1999"
    assert page.locator("#next").is_disabled()
    page.locator("#search").fill("RECORD-1234")
    expect(page.locator("#records > li")).to_have_count(1)
    assert found.text_content() == "1 of 2,000 records"
    page.locator("#search").fill("1999: how many")
    expect(page.locator("#records mark").first).to_have_text("1999: How many")
    page.locator("#search").fill("not in any record")
    expect(page.locator("#records > li")).to_have_count(0)
    assert where.text_content() == "page 1 of 1"


def test_a_long_text_is_shown_in_full_on_demand(hostile: Path, visit: Any) -> None:
    page = visit(hostile / "report.html")
    page.locator("#search").fill("longxxx")
    expect(page.locator("#records > li")).to_have_count(1)
    assert len(page.locator("#records .text").last.text_content()) < 1_000
    page.locator("#records button.more").last.click()
    assert page.locator("#records .text").last.text_content() == HOSTILE["long"]


def test_hostile_records_run_nothing_and_are_shown(hostile: Path, visit: Any) -> None:
    page = visit(hostile / "report.html")
    assert page.evaluate("window.broken") is None
    assert page.title().startswith("Coreset report")
    for name in ("script", "closing", "image", "quotes", "emoji", "arabic"):
        page.locator("#search").fill(HOSTILE[name])
        expect(page.locator("#records .name")).to_have_text([f"{name} <id>\"'⟨U+202E⟩"])
        assert HOSTILE[name] in page.locator("#records .text").last.text_content()
    page.locator("#search").fill("left")
    expect(page.locator("#records .name")).to_contain_text(["override"])
    shown = page.locator("#records .text").last.text_content()
    assert "⟨U+202E⟩" in shown
    assert "\u202e" not in shown
    page.locator("#search").fill("nul ")
    expect(page.locator("#records .name")).to_contain_text(["control"])
    assert "nul ␀ bell ␇ escape ␛[31m delete ␡" in page.locator("#records .text").last.text_content()
    for part in page.locator("details").all():
        part.evaluate("(part) => { part.open = true; }")
    for which in ("borderline", "bottom", "top"):
        page.locator("#which").get_by_text(which).click()
    assert page.evaluate("window.broken") is None
    assert page.locator("main img, main script, main iframe").count() == 0


def test_the_policy_stops_a_script_that_is_not_ours(plain: Path, browser: Any) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto((plain / "report.html").as_uri())
    page.evaluate(
        "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s)"
    )
    assert page.evaluate("window.broken") is None
    context.close()


def test_the_mix_by_another_field(hostile: Path, room: Room, visit: Any) -> None:
    page = visit(hostile / "report.html")
    options = page.locator("#mix-field option")
    if options.count() > 1:
        page.locator("#mix-field").select_option(index=1)
        assert page.locator(".mix:not([hidden])").count() == 1
        assert page.locator(".mix:not([hidden])").get_attribute("data-mix") == "1"
    assert "<u>first</u>" in page.locator(".mix").first.text_content()


def test_colours_can_be_chosen(plain: Path, visit: Any) -> None:
    page = visit(plain / "report.html", "light")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.get_by_role("button", name="Auto").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == before


def test_a_print_is_light_and_without_controls(plain: Path, visit: Any) -> None:
    page = visit(plain / "report.html", "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".toc").is_hidden()
    assert page.locator(".pager #next").is_hidden()
    assert page.locator(".pager #page").is_visible()  # says that there is more
    assert page.locator("#chart-scores svg").is_visible()


def test_without_scripts_the_tables_are_there(plain: Path, browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((plain / "report.html").as_uri())
    assert page.locator("table").count() >= 6
    assert page.locator("noscript").count() == 1
    context.close()


def test_the_table_of_runs_sorts_by_every_column(comparison: Path, visit: Any) -> None:
    page = visit(comparison)
    buttons = page.locator("table.sortable thead button")
    for column in range(buttons.count()):
        for order in ("ascending", "descending"):
            buttons.nth(column).click()
            assert page.locator("table.sortable th").nth(column).get_attribute("aria-sort") == order
            cells = page.locator(f"table.sortable tbody td:nth-child({column + 1})")
            values = cells.evaluate_all("(cells) => cells.map((cell) => cell.dataset.value)")
            known = [value for value in values if value != ""]
            try:
                keys: list[Any] = [float(value) for value in known]
            except ValueError:
                keys = [re.sub(r"\d+", lambda found: found.group().zfill(9), value) for value in known]
            assert keys == sorted(keys, reverse=order == "descending")
            assert values[: len(known)] == known


def test_axes_follow_the_measure(comparison: Path, visit: Any) -> None:
    page = visit(comparison)
    page.locator("#axis-measure").select_option("records in the coreset")
    text = page.locator("#axis-charts").text_content()
    assert "method.name" in text
    assert "selection.count" in text
    rows = page.locator("#axis-charts figure", has_text="selection.count").locator("tbody tr")
    assert [row.split()[0] for row in rows.all_inner_texts()] == ["6", "12"]


def test_points_show_what_they_are(comparison: Path, visit: Any) -> None:
    page = visit(comparison)
    page.locator("#plot-y").select_option("mean length of a picked record")
    page.locator("#plot-x").select_option("records in the coreset")
    svg = page.locator("#chart-plot svg[role=img]")
    assert svg.count() == 1
    assert svg.locator("g[fill^='var(--hue'] :is(path, circle)").count() == 6
    svg.locator("g[fill='var(--hue0)'] circle").first.hover(force=True)
    expect(svg).to_contain_text("records in the coreset: 6")


def test_side_by_side(comparison: Path, visit: Any) -> None:
    page = visit(comparison)
    data = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
    page.locator("#side-a").select_option("0")
    page.locator("#side-b").select_option("2")
    for side, pair in (("a", "0-2"), ("b", "2-0")):
        assert (
            page.locator(f"#side-{side}-h").text_content().startswith(f"{data['exclusive'][pair]['total']} only here")
        )
        names = page.locator(f"#side-{side}-list .name").all_text_contents()
        assert names == [data["records"][key]["id"] for _, key in data["exclusive"][pair]["shown"]]


def test_the_page_of_one_record_shows_its_tokens(explained: Path, visit: Any) -> None:
    page = visit(explained)
    assert page.locator("#only-view .tokens").count() == 1
    assert "window.broken = 1" in page.locator("#only-view .tokens").text_content()
    page.locator("#only-view .tok:not(.off)").first.hover()
    assert "matched class" in page.locator("#tip").text_content()
