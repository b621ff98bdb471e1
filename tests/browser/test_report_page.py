"""The page in a real browser: it sorts, loads nothing, can be read, and nothing in it runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page

from bench.report.table import MISSING, latest

pytestmark = pytest.mark.browser
BOTH = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])

# Every text of the page against what lies behind it (WCAG 2.1, relative luminance), as
# [ratio, text]; what is clipped away, such as words for screen readers, is not seen.
CONTRAST = """() => {
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return { light: 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b), a };
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const found = parse(getComputedStyle(e).backgroundColor);
      if (found.a === 1) return found.light;
      if (found.a > 0) throw new Error("half transparent: " + e.outerHTML.slice(0, 80));
    }
    throw new Error("nothing behind " + element.outerHTML.slice(0, 80));
  };
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    const style = getComputedStyle(parent);
    const hidden = parent.closest(".unseen, script, style") || style.display === "none";
    if (!text || hidden || !parent.getClientRects().length) continue;
    const inPlot = parent.closest("svg");
    const [a, b] = [parse(inPlot ? style.fill : style.color).light, behind(parent)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, `${text.slice(0, 60)} <${parent.tagName}>`]);
  }
  return found;
}"""


def column(page: Page, heading: str) -> list[str]:
    """The texts of one column of the first table, from top to bottom."""
    return page.evaluate(
        """(heading) => {
          const table = document.querySelector("table.sortable");
          const heads = [...table.tHead.rows[0].cells];
          const index = heads.findIndex((head) => head.textContent.startsWith(heading));
          const rows = [...table.querySelectorAll("tbody.r > tr:first-child")];
          return rows.map((row) => row.cells[index].textContent.trim());
        }""",
        heading,
    )


def numbers(texts: list[str]) -> list[float]:
    """The values of cells, without those that have none."""
    return [float(text.partition("±")[0].replace(",", "")) for text in texts if text != MISSING]


def sections(page: Page) -> list[str]:
    return page.locator("table.sortable tbody.r:visible th i").evaluate_all(
        "found => found.map((one) => one.textContent)"
    )


def test_a_click_on_a_heading_sorts_within_sections(open_page, shipped_page: Path) -> None:
    page = open_page(shipped_page).page
    before, order = column(page, "FID"), sections(page)
    head = page.locator("th", has=page.get_by_role("button", name="FID")).first
    assert head.get_attribute("aria-sort") == "none"
    page.get_by_role("button", name="FID").first.click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert sections(page) == order
    teachers = [v for v, s in zip(column(page, "FID"), order, strict=True) if s == "Teacher"]
    assert numbers(teachers) == sorted(numbers(teachers))
    page.get_by_role("button", name="FID").first.click()
    assert head.get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="FID").first.click()
    assert head.get_attribute("aria-sort") == "none"
    assert column(page, "FID") == before


def test_the_keyboard_sorts_across_sections_and_opens_a_row(open_page, shipped_page: Path) -> None:
    page = open_page(shipped_page).page
    page.get_by_role("checkbox").first.focus()
    page.keyboard.press("Space")
    page.get_by_role("button", name="images/s").first.focus()
    page.keyboard.press("Enter")  # speed: the largest first, rows without one last
    found = column(page, "images/s")
    assert numbers(found) == sorted(numbers(found), reverse=True)
    assert found[-1] == MISSING
    assert "Sorted by images/s, descending" in page.get_by_role("status").first.text_content()
    assert page.locator("table.sortable tbody.s:visible").count() == 0
    assert page.locator("table.sortable i:visible").count() == len(found)
    page.keyboard.press("Space")
    found = numbers(column(page, "images/s"))
    assert found == sorted(found)
    summary = page.locator("tbody.r summary").first
    summary.focus()
    page.keyboard.press("Enter")
    facts = page.locator("tbody.r dl").first
    assert facts.is_visible()
    assert "Repeat with" in facts.text_content()
    assert facts.locator("pre").text_content().startswith("dimo bench --")


def test_nothing_is_loaded_and_nothing_complains(open_page, shipped_page: Path) -> None:
    opened = open_page(shipped_page)
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.get_by_role("button", name="FID").first.click()
    loaded = [url for url in opened.requests if not url.startswith("data:")]
    assert loaded == [shipped_page.as_uri()]
    assert opened.complaints == []


def test_every_picture_is_there_and_has_words(
    open_page, shipped_page: Path, shipped_records, metrics
) -> None:
    page = open_page(shipped_page).page
    pictures = page.locator("img").evaluate_all(
        "found => found.map((i) => [i.complete && i.naturalWidth > 0, i.alt])"
    )
    records = latest(shipped_records)
    assert len(pictures) == sum(record.method.section == "Teacher" for record in records) >= 5
    assert all(whole and "20 images of MaskGIT" in alt for whole, alt in pictures)
    plots = page.locator("figure > svg").evaluate_all(
        """found => found.map((s) => {
          const used = [...s.querySelectorAll("use")].map((u) => u.getAttribute("href").slice(1));
          const box = s.getBoundingClientRect();
          const clipped = [...s.querySelectorAll("text")].filter((t) => {
            const r = t.getBoundingClientRect();
            return r.left < box.left - 2 || r.right > box.right + 2
              || r.top < box.top - 2 || r.bottom > box.bottom + 2;
          });
          return [s.getAttribute("aria-label"), s.querySelectorAll("path").length,
                  used.every((id) => document.getElementById(id)), clipped.map((t) => t.innerHTML)];
        })"""
    )
    # cost, steps, trade-offs of rows and of sweeps, sweeps of temperature and eta, a run's losses
    assert len(plots) == 2 + len(metrics) + 2 + 2 + 2 + 1
    for words, paths, whole, clipped in plots:
        assert " against " in words
        assert paths > 5
        assert whole
        assert clipped == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


@BOTH
def test_text_stands_out(open_page, shipped_page: Path, dark: bool) -> None:
    page = open_page(shipped_page, dark=dark).page
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(19, 22, 25)" if dark else "rgb(252, 252, 251)"
    )
    page.get_by_role("button", name="FID").first.click()
    found = page.evaluate(CONTRAST)
    assert len(found) > 1000
    assert [text for ratio, text in found if ratio < 4.5] == []


@pytest.mark.parametrize("which", ["shipped_page", "hostile_page"])
@pytest.mark.parametrize("width", [360, 1280])
def test_no_width_scrolls_sideways(
    open_page: Callable, which: str, width: int, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(which), width=width).page
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 360:
        region = page.get_by_role("region").first
        assert region.evaluate("(e) => e.scrollWidth > e.clientWidth")
        region.focus()  # and a keyboard gets to the rest of the table
        page.keyboard.press("End")
        page.keyboard.press("ArrowRight")
        page.wait_for_function("(e) => e.scrollLeft > 0", arg=region.element_handle())


def test_hostile_text_is_only_text(open_page, hostile_page: Path) -> None:
    opened = open_page(hostile_page)
    page = opened.page
    page.locator("tbody.r th").first.hover()
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.get_by_role("button", name="Method").click()
    assert page.title() == "Handwritten digits, 8 x 8, class-conditional"
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0
    assert page.locator("[onerror], [onmouseover], [onfocus], [autofocus]").count() == 0
    names = column(page, "Method")
    assert any("<script>document.title='owned'</script>" in name for name in names)
    assert any("{{ 7 * 7 }}" in name for name in names)
    assert "\u202e" not in page.content()
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [
        hostile_page.as_uri()
    ]
    heights = page.locator("tbody.r > tr:first-child").evaluate_all(
        "rows => rows.map((row) => row.offsetHeight)"
    )
    assert max(heights) < 200
    assert (
        page.locator("dd, pre").evaluate_all(
            "found => Math.max(...found.map((e) => e.offsetHeight))"
        )
        < 500
    )


def test_a_calm_page_for_those_who_ask_for_it(chromium, shipped_page: Path) -> None:
    context = chromium.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(shipped_page.as_uri())
    behaviour = page.evaluate("getComputedStyle(document.documentElement).scrollBehavior")
    context.close()
    assert behaviour == "auto"


def test_print_has_no_controls_and_no_boxes_that_scroll(open_page, shipped_page: Path) -> None:
    page = open_page(shipped_page, dark=True).page
    page.emulate_media(media="print")
    assert not page.locator(".controls").first.is_visible()
    styles = page.locator(".part > .scroll").first.evaluate(
        "(e) => [getComputedStyle(e).overflowX, getComputedStyle(document.body).color]"
    )
    assert styles == ["visible", "rgb(27, 31, 36)"]
