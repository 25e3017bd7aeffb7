"""The page in a real browser: nothing overflows, figures are drawn, tables sort, and no sample's script runs."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from finished_run import synthetic_run

from untether.sim.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (400, 700, 1400)

_MEASURE = """
addEventListener("load", () => setTimeout(() => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const wide = [...page.querySelectorAll(".wide")].filter((box) => box.scrollWidth > box.clientWidth + 1);
    const shown = [...page.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect());
    const drawn = shown.filter((box) => box.width > 100 && box.height > 50);
    const table = page.querySelector("table.sortable");
    const button = table.tHead.rows[0].cells[1].querySelector("button");
    const column = () => [...table.tBodies[0].rows].map((row) => parseFloat(row.cells[1].textContent));
    button.click();
    const down = column();
    button.click();
    found[frame.width] = {
      overflow: root.scrollWidth - root.clientWidth, wide: wide.map((box) => box.innerText.slice(0, 80)),
      figures: shown.length, drawn: drawn.length,
      broken: drawn.filter((box) => box.right > root.clientWidth + 1).length,
      ran: Boolean(frame.contentWindow.ran), down, up: column(), sort: button.parentNode.getAttribute("aria-sort"),
      cards: page.querySelectorAll("table.cards").length, title: page.title,
    };
  }
  document.body.dataset.found = JSON.stringify(found);
}, 300));
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the browser says of a report whose samples and answers try to run scripts, at each width."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    folder = tmp_path_factory.mktemp("page")
    run = synthetic_run(folder / "run", evil="<script>window.ran = true</script><img src=x onerror='window.ran=true'>")
    page = write_report(run).read_text(encoding="utf-8")
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{html.escape(page)}"></iframe>' for w in WIDTHS)
    outer = folder / "frames.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}<script>{_MEASURE}</script>", encoding="utf-8")
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000",
        "--virtual-time-budget=20000", f"--user-data-dir={folder / 'profile'}", "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=280).stdout
    found = re.search(r'<body data-found="([^"]*)"', dom)
    assert found, dom[:300]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(seen, width):
    page = seen[str(width)]
    assert page["overflow"] <= 0 and page["wide"] == [] and page["broken"] == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_are_drawn(seen, width):
    page = seen[str(width)]
    assert page["drawn"] >= 4
    assert page["drawn"] == page["figures"] - 1  # of the first one, the broad or the slim form


def test_tables_become_cards_where_they_do_not_fit(seen):
    assert seen["400"]["cards"] > 2 * seen["1400"]["cards"]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_script_of_a_sample_or_an_answer_runs(seen, width):
    assert seen[str(width)]["ran"] is False


def test_a_click_on_a_head_sorts_by_numbers_and_says_so(seen):
    page = seen["1400"]
    assert page["down"] == sorted(page["down"], reverse=True) and page["up"] == sorted(page["up"])
    assert page["sort"] == "ascending"


def test_the_window_is_titled_with_the_answer(seen):
    assert seen["1400"]["title"].startswith("Collaborative beat")
