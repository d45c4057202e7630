"""The report of a night: the page, JUnit XML, the Markdown summary, annotations, the history."""

import base64
import json
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kernelfuzz.fuzz.report.github import annotations
from kernelfuzz.fuzz.report.junit import junit
from kernelfuzz.fuzz.report.markdown import summary
from kernelfuzz.fuzz.report.page import page
from kernelfuzz.fuzz.report.view import read_view

sys.path.insert(0, str(Path(__file__).parent))
from browser import CHROMIUM, browser
from nights import Nights, shown_failure, three_nights

HOSTILE = (
    '</script><script>alert(1)</script> "><img src=x onerror=alert(2)> | `x` ]]> \x00\x07\x1b[31m \u202e'
    " %0A\r\n::error::@you &amp;" + "y" * 2000
)
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Elements(HTMLParser):
    """The elements of a page, their attributes, and the text that is shown."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.ids, self._inside = [], [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        self._inside.append(tag)

    def handle_endtag(self, tag):
        if tag in self._inside:
            del self._inside[len(self._inside) - 1 - self._inside[::-1].index(tag) :]

    def handle_data(self, data):
        if not {"script", "style"} & set(self._inside):
            self.text += data


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A store with a failure of each status in its last night, one of them with a picture and a bisection."""
    nights = three_nights(tmp_path_factory.mktemp("store"))
    folder = shown_failure(nights, 0)
    (folder / "writemap.png").write_bytes(PIXEL)
    results = [
        {"fingerprint": nights.failure(0).fingerprint, "version": version, "state": state, "note": "", "runs": 1}
        for version, state in (("0.22.0", "good"), ("0.19.1", "bad"), ("0.20.0", "bad"), ("0.21.0", "cannot run"))
    ]
    (folder / "bisect.json").write_text(json.dumps({"schema": 1, "results": results}))
    return nights


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The same where all texts are attacks."""
    return three_nights(tmp_path_factory.mktemp("hostile"), HOSTILE)


def test_page_says_what_is_new_first(night):
    text = page(read_view(night.folder))
    shown = Elements(text).text
    assert "1 new 1 returned 1 known 1 listed 1 fixed 1 unseen" in " ".join(shown.split())
    places = [shown.index(night.failure(number).fingerprint) for number in (0, 3, 1, 4, 2, 5)]
    assert places == sorted(places)
    assert len(re.findall(r'<details class="card (?:new|returned)"[^>]* open>', text)) == 2
    assert not re.search(r'<details class="card (?:known|listed|fixed|unseen)"[^>]* open>', text)


def test_page_shows_case_picture_script_and_bisection(night):
    text = page(read_view(night.folder))
    shown = Elements(text).text
    assert "num_experts=" in shown
    assert base64.b64encode(PIXEL).decode() in text
    assert "It went away between 0.20.0 and 0.22.0." in " ".join(shown.split())
    assert "kernelfuzz replay" in shown
    assert "import torch" in shown


def test_page_of_an_earlier_night_knows_nothing_of_later_ones(night):
    view = read_view(night.folder, 1)
    assert view.verdict == "4 new"
    assert [each.run.id for each in view.nights] == [1]


def test_page_names_what_was_not_tried(night):
    view = read_view(night.folder)
    (job,) = [job for job in view.jobs if job.target == "moe_lora_align"]
    never = [
        value
        for each in job.document["coverage"]["dimensions"]
        for value, count in zip(each["values"], each["counts"])
        if not count
    ]
    assert never
    shown = Elements(page(view)).text
    assert all(value in shown for value in never)


def test_page_needs_no_network_and_runs_its_own_script_only(night, hostile):
    for nights in (night, hostile):
        text = page(read_view(nights.folder))
        elements = Elements(text)
        sources = [value for name, value in elements.attributes if name in ("src", "href", "action", "data", "srcset")]
        assert all(value.startswith(("data:", "#")) for value in sources)
        policy = next(
            value for name, value in elements.attributes if name == "content" and value and "default-src" in value
        )
        assert "default-src 'none'" in policy
        assert "script-src 'sha256-" in policy
        assert "url(" not in text
        assert len(elements.ids) == len(set(elements.ids))


def test_page_escapes_what_kernels_say(night, hostile):
    plain, attacked = Elements(page(read_view(night.folder))), Elements(page(read_view(hostile.folder)))
    assert "alert(1)" in attacked.text
    assert not [name for name, _ in attacked.attributes if name.startswith("on")]
    assert attacked.tags.count("script") == plain.tags.count("script")
    assert attacked.tags.count("img") == 0
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", attacked.text)


def test_data_for_the_script_is_what_was_counted(hostile):
    text = page(read_view(hostile.folder))
    found = re.findall(r'<script type="application/json" id="pairs-\d+">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 2
    for each in found:
        data = json.loads(each)
        sizes = [len(dimension["values"]) for dimension in data["dimensions"]]
        for i, j, counts in data["pairs"]:
            assert i < j
            assert (len(counts), len(counts[0])) == (sizes[i], sizes[j])


def test_page_of_many_failures_and_jobs_stays_small(tmp_path):
    nights = Nights(tmp_path)
    nights.start()
    picture = PIXEL + bytes(100_000)
    for number in range(120):
        nights.see(number)
        if number < 50:
            folder = shown_failure(nights, number)
            (folder / "writemap.png").write_bytes(picture)
            for name in ("README.md", "repro.py"):
                (folder / name).write_text("x" * 100_000)
    nights.count()
    view = read_view(tmp_path)
    statistics = {
        (job.target, f"{job.kernel}+{copy}", job.device): job.document for job in view.jobs for copy in range(12)
    }
    nights.store.save_statistics(nights.run, statistics)
    nights.finish(1)
    view = read_view(tmp_path)
    assert len(view.jobs) == 26
    text = page(view)
    assert len(text.encode()) <= 3_000_000
    assert base64.b64encode(picture).decode() in text
    assert "Its picture did not fit into this page" in text
    assert "characters more" in text
    assert "and 20 more, which" in text
    assert "The pairs of the first 12 jobs are shown." in text


def test_failures_of_earlier_nights_stay_in_the_history(tmp_path):
    nights = Nights(tmp_path)
    for number in range(2):
        nights.start()
        nights.see(number)
        nights.count()
        nights.finish(1)
    view = read_view(tmp_path)
    gone = nights.failure(0).fingerprint
    assert gone not in [each.failure.fingerprint for each in view.failures]
    assert view.timelines[gone] == {1: "new"}
    assert gone in Elements(page(view)).text


def test_bisections_on_other_devices_and_of_commits_are_kept_apart(tmp_path):
    nights = Nights(tmp_path)
    nights.start()
    nights.see(0)
    nights.count()
    nights.finish(1)
    names = ("device", "version", "state")
    rows = (
        ("cpu", "0.9.0", "good"),
        ("cuda", "0.10.0", "bad"),
        ("cuda", "0.9.0", "good"),
        ("cuda", "c0ffee" * 6, "bad"),
        ("cuda", "0.8.0", "good"),
    )
    results = [{"fingerprint": nights.failure(0).fingerprint, **dict(zip(names, row))} for row in rows]
    (shown_failure(nights, 0) / "bisect.json").write_text(json.dumps({"schema": 1, "results": results}))
    (failure,) = read_view(tmp_path).failures
    assert [each.version for each in failure.bisection] == ["0.8.0", "0.9.0", "0.10.0", "c0ffee" * 6]
    assert failure.change == "came in between 0.9.0 and 0.10.0"


def test_contrast_of_texts_in_both_themes():
    style = (Path(__file__).parents[2] / "fuzz" / "report" / "style.css").read_text()
    blocks = re.findall(r":root[^{]*\{([^}]*)\}", style)
    themes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks]
    themes = [theme for theme in themes if theme]
    assert len(themes) == 3
    assert themes[1] == themes[2]
    pairs = [(text, back) for text in ("text", "soft", "accent", "new") for back in ("page", "card")]
    pairs += [(name, f"{name}-back") for name in ("new", "known", "fixed", "unseen")]
    for theme in themes[:2]:
        for text, back in pairs:
            assert contrast(theme[text], theme[back]) >= 4.5, (text, back)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.1."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def attacked_page(hostile, tmp_path_factory):
    (shown_failure(hostile, 0) / "writemap.png").write_bytes(PIXEL)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(read_view(hostile.folder)))
    return path


@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_into_a_window_in_both_themes(chromium, attacked_page, width):
    colours = set()
    for theme in ("light", "dark"):
        chromium.open(attacked_page, width, theme)
        colours.add(chromium.ask("getComputedStyle(document.body).backgroundColor"))
        chromium.ask("for (const each of document.querySelectorAll('details')) each.open = true")
        assert chromium.ask("innerWidth") == width
        assert chromium.ask("document.documentElement.scrollWidth") <= width
        assert chromium.ask("[...document.images].every(each => each.naturalWidth > 0)")
    assert len(colours) == 2
    assert not chromium.complaints


def test_page_is_used_with_the_keyboard(chromium, attacked_page):
    def tab_to(selector: str) -> None:
        for _ in range(60):
            chromium.press("Tab")
            if chromium.ask(f"document.activeElement.matches({selector!r})"):
                return
        pytest.fail(f"Tab does not come to {selector}")

    chromium.open(attacked_page, 1280)
    tab_to("details.known > summary")
    assert chromium.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    chromium.press("Enter")
    assert chromium.ask("document.querySelector('details.known').open")
    tab_to(".heat button")
    first = chromium.ask("document.activeElement.title")
    assert chromium.ask("document.querySelector('.said').textContent") == first
    chromium.press("ArrowRight")
    second = chromium.ask("document.activeElement.title")
    assert second.split(": ")[0] != first.split(": ")[0]
    chromium.press("Enter")
    assert chromium.ask("document.querySelector('#pairs h3').textContent") == second.split(": ")[0]
    assert chromium.ask("document.querySelectorAll('#pairs td').length") > 0
    chromium.press("Escape")
    assert not chromium.ask("document.getElementById('pairs').open")
    assert chromium.ask("document.activeElement.title") == second
    chromium.press("Tab")
    assert not chromium.ask("document.activeElement.matches('.heat button')")
    assert not chromium.complaints


def test_page_is_read_without_scripts(chromium, attacked_page, hostile):
    chromium("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(attacked_page, 1280)
        text = chromium.ask("document.body.innerText")
        seen = chromium.ask("[...document.querySelectorAll('button')].filter(each => each.offsetParent).length")
        cells = chromium.ask("[...document.querySelectorAll('.heat button')].filter(each => each.offsetParent).length")
    finally:
        chromium("Emulation.setScriptExecutionDisabled", value=False)
    assert all(hostile.failure(number).fingerprint in text for number in range(6))
    assert seen == cells > 0  # their titles can be read; what would do nothing is hidden


def test_page_is_printed_black_on_white(chromium, attacked_page):
    chromium.open(attacked_page, 1280, "dark", "print")
    assert chromium.ask("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert chromium.ask("getComputedStyle(document.querySelector('.card')).backgroundColor") == "rgb(255, 255, 255)"


def test_page_remembers_the_theme_that_was_chosen(chromium, attacked_page):
    chromium.open(attacked_page, 1280)
    dark = "document.documentElement.dataset.theme === 'dark'"
    assert not chromium.ask(dark)
    chromium.ask("document.getElementById('theme').click()")
    assert chromium.ask(dark)
    chromium.open(attacked_page, 1280)
    assert chromium.ask(dark)
    chromium.ask("localStorage.clear()")


def test_a_link_to_a_failure_opens_it(chromium, attacked_page):
    chromium.open(attacked_page, 1280)
    opened = "document.querySelector('details.fixed').open"
    assert not chromium.ask(opened)
    chromium.ask(
        "document.querySelector(`.nights a[href='#${document.querySelector('details.fixed').id}']`).click(),"
        " new Promise(resolve => setTimeout(resolve))"
    )
    assert chromium.ask(opened)


def test_junit_fails_for_what_is_new_only(night):
    root = ET.fromstring(junit(read_view(night.folder)).encode())
    failed = {case.get("name") for case in root.iter("testcase") if case.find("failure") is not None}
    skipped = {case.get("name") for case in root.iter("testcase") if case.find("skipped") is not None}
    names = [night.failure(number).fingerprint for number in range(6)]
    assert failed == {names[0], names[3], f"40131 {night.text}"}
    assert {names[1], names[4], names[5]} <= skipped
    passed = {case.get("name") for case in root.iter("testcase") if not len(case)}
    assert names[2] in passed
    for suite in root:
        assert int(suite.get("tests")) == len(suite)
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))


def test_junit_is_xml_whatever_kernels_say(hostile):
    root = ET.fromstring(junit(read_view(hostile.folder)).encode())
    assert any("alert(1)" in (failure.get("message") or "") for failure in root.iter("failure"))


def test_markdown_is_a_table_whatever_kernels_say(night, hostile):
    plain, attacked = summary(read_view(night.folder)), summary(read_view(hostile.folder))
    assert plain.startswith("## kernelfuzz, run 3: 1 new, 1 returned, 1 known")
    assert len(attacked.splitlines()) == len(plain.splitlines())
    assert not re.search(r"<(script|img)|(?<!\\)\|.*(?<!\\)`x`|@you", attacked)
    for one, other in zip(plain.splitlines(), attacked.splitlines()):
        assert len(re.findall(r"(?<!\\)\|", one)) == len(re.findall(r"(?<!\\)\|", other))


def test_annotations_are_one_line_each(hostile):
    lines = annotations(read_view(hostile.folder))
    kinds = [line.split(" ")[0] for line in lines]
    assert kinds == ["::error"] * 3 + ["::warning"] * 2 + ["::notice"]
    for line in lines:
        assert re.fullmatch(r"::\w+ title=[^,:\r\n]*::[^\r\n]*", line)


def test_report_writes_what_is_asked_for(night, kernelfuzz, tmp_path):
    done = kernelfuzz("report", night.folder, "-o", "a.html", "--junit", "b.xml", "--markdown", "c.md", "--run", 2)
    assert done.status == 0
    assert [line.partition(":")[0] for line in done.out.splitlines()] == ["a.html", "b.xml", "c.md"]
    assert "<h1>Run 2</h1>" in Path("a.html").read_text()
    assert Path("c.md").read_text().startswith("## kernelfuzz, run 2: 3 known, 1 fixed")
    ET.fromstring(Path("b.xml").read_text())


def test_report_of_nothing_is_one_line(kernelfuzz, tmp_path, night):
    for folder, options, expected in (
        (tmp_path / "none", (), "no store in"),
        (night.folder, ("--run", 9), "no run 9: it has runs 1 to 3"),
    ):
        done = kernelfuzz("report", folder, *options)
        assert done.status == 2
        assert expected in done.err
        assert len(done.err.splitlines()) == 1
    Nights(tmp_path / "empty")
    done = kernelfuzz("report", tmp_path / "empty")
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert "it has none yet" in done.err


def test_history_lists_nights(night, kernelfuzz):
    done = kernelfuzz("history", "--store", night.folder)
    assert done.status == 0
    assert [line.split()[0] for line in done.out.splitlines()[1:] if line[0:3].strip()] == ["3", "2", "1"]
    nights = json.loads(kernelfuzz("history", "--store", night.folder, "--json").out)
    assert [each["statuses"].get("new", 0) for each in nights] == [1, 0, 4]
    assert nights[0]["run"]["exit_status"] == 1
