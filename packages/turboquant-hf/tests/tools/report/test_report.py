"""The page of a run: read as text, and where there is a browser, opened in it."""

import json
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from importlib.metadata import entry_points

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from turboquant_core.commands import app
from turboquant_hf.tools.eval.settings import EVAL
from turboquant_hf.tools.eval.summary import summarise
from turboquant_hf.tools.report.charts import pareto
from turboquant_hf.tools.report.command import report
from turboquant_hf.tools.report.svg import Axis, Drawing
from turboquant_hf.tools.run_files.run_file import read_run_file

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (1280, 360)


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    outcome = run(finished[0], "--out", path)
    assert outcome.exit_code == 0, outcome.output
    return path


class Links(HTMLParser):
    """Collects what an element would load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, name) for name, _ in attrs if name in ("src", "href", "srcset", "data", "xlink:href")]


def test_core_finds_the_command():
    (entry_point,) = entry_points(group="turboquant.commands", name="report")
    assert entry_point.load() is report


def test_the_page_loads_nothing(page):
    links, text = Links(), page.read_text()
    links.feed(text)
    assert links.found == []
    assert "@import" not in text
    assert "url(" not in text
    assert "<script" not in text


def test_the_page_says_what_was_measured(page, finished):
    text, summary = page.read_text(), summarise(read_run_file(finished[0], EVAL))
    for cache in summary.caches:
        assert f"{cache.quality.bytes_per_token:,.0f}" in text
        assert f"{cache.quality.perplexity:.3f}" in text
    assert f"{summary.caches[1].quality.mean_kl:.4f}" in text
    # Quality, speed and layers.
    assert text.count('<svg viewBox="0 0 380 280"') == 3
    # Two depths of one length, for each of three caches.
    assert text.count('<td style="--share') == 6


def test_names_are_text_and_nothing_else(continued, tmp_path):
    path, page = continued(lambda name: True), tmp_path / "report.html"
    data = json.loads(path.read_text())
    data["model"]["name"] = "<script>alert(1)</script>&"
    path.write_text(json.dumps(data))
    assert run(path, "--out", page).exit_code == 0
    assert "<script" not in page.read_text()
    assert "&lt;script&gt;" in page.read_text()


def test_a_run_that_is_not_finished(continued, tmp_path):
    path, page = continued(lambda name: name == "quality/tq4"), tmp_path / "report.html"
    outcome = run(path, "--out", page)
    assert outcome.exit_code == 1
    assert "is not finished: 11 measurements are missing" in " ".join(outcome.output.split())
    assert "11 measurements are missing" in page.read_text()


def test_several_runs_and_a_model_card_and_json(finished, tmp_path):
    card = tmp_path / "card.md"
    outcome = run(finished[0], finished[0], "--out", tmp_path / "r.html", "--model-card", card, "--json", "-")
    assert outcome.exit_code == 0, outcome.output
    runs = json.loads(outcome.stdout)["runs"]
    assert [cache["cache"] for cache in runs[0]["caches"]] == ["uncompressed", "tq4", "k8v4"]
    assert (tmp_path / "r.html").read_text().count("<h2>") == 2
    figures = runs[0]["caches"][1]
    row = next(line for line in card.read_text().splitlines() if line.startswith("| tq4 "))
    assert f"{figures['bytes_per_token']:,.0f} | {figures['compression']:.2f}x | {figures['mean_kl']:.4f}" in row
    assert 'TurboQuantCache(model.config, "' in card.read_text()


def test_only_pages_of_its_own_are_replaced(finished, tmp_path):
    page, card = tmp_path / "report.html", tmp_path / "card.md"
    for _ in range(2):
        assert run(finished[0], "--out", page, "--model-card", card).exit_code == 0
    notes = tmp_path / "notes.md"
    notes.write_text("notes")
    for options in (("--out", notes), ("--out", card), ("--out", page, "--model-card", page)):
        outcome = run(finished[0], *options)
        assert outcome.exit_code == 2, options
    assert notes.read_text() == "notes"
    outcome = run(finished[0], "--out", finished[0], "--force")
    assert outcome.exit_code == 2
    assert "are the same file" in " ".join(outcome.output.split())
    assert run(finished[0], "--out", notes, "--force").exit_code == 0
    assert notes.read_text().startswith("<!doctype html>")


def test_what_cannot_be_read(continued, tmp_path):
    path = continued(lambda name: True)
    path.write_text(path.read_text()[:500])
    for run_file, reason in ((path, "damaged or half-written"), (tmp_path / "none.json", "there is no run file")):
        outcome = run(run_file, "--out", tmp_path / "report.html")
        assert outcome.exit_code == 2
        assert reason in " ".join(outcome.output.split())
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        (("results", "quality/tq4", "bytes_per_token"), 0, "bytes_per_token of Quality is 0"),
        (("results", "quality/tq4", "bytes_per_token"), 1e308, "is 1e+308, which is no measurement"),
        (("results", "quality/tq4", "bytes_per_token"), -5.0, "is -5"),
        (("results", "quality/tq4", "mean_kl"), -1e308, "is -1e+308"),
        (("results", "quality/tq4", "num_tokens"), -1, "is -1"),
        (("results", "speed/tq4", "reference_tokens_per_second"), 0.0, "is 0"),
        (("results", "layers/tq4", "layers", 0, "index"), 1, "has a layer twice"),
        (("settings", "greedy_tokens"), 0, "no number of tokens"),
        (("settings", "needle_depths"), [2.0], "a depth is none"),
        (("settings", "needle_lengths"), list(range(1, 2000)), "no list of 1000"),
        (("settings", "caches"), [["tq4"]], "a name is no text"),
    ],
)
def test_numbers_that_were_not_measured(continued, tmp_path, where, value, reason):
    path = continued(lambda name: True)
    data = json.loads(path.read_text())
    part = data
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    path.write_text(json.dumps(data))
    outcome = run(path, "--out", tmp_path / "report.html")
    assert outcome.exit_code == 2
    assert reason in " ".join(outcome.output.split())
    assert not (tmp_path / "report.html").exists()


def test_a_run_file_that_does_not_say_its_command(continued, tmp_path):
    path, page = continued(lambda name: True), tmp_path / "report.html"
    data = json.loads(path.read_text())
    del data["command"]
    path.write_text(json.dumps(data))
    assert run(path, "--out", page, "--model-card", tmp_path / "card.md").exit_code == 0
    assert "Made by" not in page.read_text()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_run_file_ends_it_otherwise(finished, tmp_path, data):
    """Anything in the place of any part of a run file is refused in a line, or shown."""
    content = json.loads(finished[0].read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        part = content
        while True:
            key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
            if not isinstance(part[key], dict | list) or not part[key] or data.draw(st.booleans()):
                break
            part = part[key]
        part[key] = data.draw(st.sampled_from([None, 0, -3, 1.5, "two", 1e308, 10**30, [], {}, True, [[]], "", [0.5]]))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    outcome = run(path, "--out", tmp_path / "report.html", "--model-card", tmp_path / "card.md", "--json", "-")
    assert outcome.exit_code in (0, 1, 2), outcome.exception
    assert "bug: " not in outcome.output, outcome.output
    assert isinstance(json.loads(outcome.stdout, parse_constant=pytest.fail), dict)


def test_a_folder_that_is_not_there(finished, tmp_path):
    outcome = run(finished[0], "--out", tmp_path / "none" / "report.html")
    assert outcome.exit_code == 2
    assert "there is no folder" in outcome.output


def test_none_on_the_front_is_beaten():
    assert pareto([(3, 1), (1, 0.5), (2, 0.4), (4, 0.9), (2, 0.7)]) == [(1, 0.5), (2, 0.7), (3, 1)]


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis.around("bytes", [3_439, 23_040]), [0, 5_000, 10_000, 15_000, 20_000, 25_000]),
        (Axis.around("KL", [0.005, 0.7], is_log=True), [0.001, 0.01, 0.1, 1]),
        (Axis.around("KL", [0.1, 0.1], is_log=True), [0.1, 1]),
        (Axis("layer", 0, 29), [0, 10, 20]),
        (Axis("layer", 0, 3), [0, 1, 2, 3]),
    ],
)
def test_ticks_are_round_numbers(axis, ticks):
    assert axis.ticks() == pytest.approx(ticks)
    assert axis.share(axis.low) == 0
    assert axis.share(axis.high) == pytest.approx(1)


def test_names_of_neighbours_do_not_lie_on_each_other():
    drawing = Drawing("test", Axis("x", 0, 100), Axis("y", 0, 100))
    drawing.points([((50 + number, 50 + number), f"name{number}", "turboquant", "") for number in range(3)])
    names = [element for element in drawing._root.iter("text") if element.get("class") == "name"]
    places = {(name.get("x"), name.get("y"), name.get("text-anchor")) for name in names}
    assert len(places) == 3
    boxes = drawing._taken[3:]
    for index, box in enumerate(boxes):
        for other in boxes[:index]:
            apart = box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
            assert apart


def test_a_browser_lays_the_page_out_at_every_width(page, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{escape(page.read_text())}"></iframe>' for width in WIDTHS
    )
    measure = """
    addEventListener("load", () => {
      const seen = [...document.querySelectorAll("iframe")].map(frame => {
        const page = frame.contentDocument, root = page.documentElement
        const boxes = [...page.querySelectorAll("svg[role]")].map(svg => svg.getBoundingClientRect())
        return {
          overflow: root.scrollWidth - root.clientWidth,
          drawings: boxes.map(box => [box.left, box.right, box.height]),
          title: page.title,
          ink: getComputedStyle(page.body).color,
          heat: [...page.querySelectorAll(".heatmap td")].map(cell => getComputedStyle(cell).backgroundColor),
        }
      })
      document.body.textContent = JSON.stringify(seen)
    })"""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><body>{frames}<script>{measure}</script>")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run(
        [*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    seen = json.loads(dom[dom.index("[") : dom.rindex("]") + 1])
    assert len(seen) == len(WIDTHS)
    for width, layout in zip(WIDTHS, seen, strict=True):
        assert layout["overflow"] == 0, width
        assert layout["title"].startswith("KV cache: ")
        assert len(layout["drawings"]) == 3
        for left, right, height in layout["drawings"]:
            assert 0 <= left < right <= width
            assert height > 150
        assert "rgba(0, 0, 0, 0)" not in layout["heat"]
    wide, narrow = (layout["drawings"] for layout in seen)
    # Side by side where there is room, else one below the other.
    assert wide[1][0] > wide[0][1]
    assert narrow[1][0] == narrow[0][0]
