"""The comparison's pictures: the HTML page in a real browser, without network; the PNG."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from test_compare import make_run, seeds_of

from comparison import compare, group_runs, load_runs, write_html, write_plot
from comparison.pictures import COLORS, mean_line
from comparison.report import verdicts

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class Browser:
    """A headless Chromium, driven over a pipe by the DevTools protocol; keeps what the page requests and says."""

    FLAGS = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
        "--remote-debugging-pipe",
    )

    def __init__(self, program: str, profile: Path):
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._numbers, self._buffer = itertools.count(1), b""
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]

        def take_ends():  # the browser reads commands from 3 and answers on 4
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [program, *self.FLAGS, f"--user-data-dir={profile}", "about:blank"],
            close_fds=False,
            preexec_fn=take_ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self._session = None
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """One command and its result; events that arrive meanwhile are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(timeout=60)
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self, timeout: float) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], timeout)
            assert ready, "the browser does not answer"
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "the browser has gone"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        event = json.loads(line)
        self._take(event)
        return event

    def _take(self, event: dict) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(str(parameters["entry"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(f"console.{parameters['type']}: {parameters['args']}")

    def open(self, path: Path) -> None:
        """Load a file and wait until its scripts have run."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def run(self, script: str):
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1})
        path.write_bytes(base64.b64decode(picture["data"]))

    def close(self) -> None:
        """End the browser and wait for it."""
        self._session = None
        try:
            self.call("Browser.close")
        except (AssertionError, OSError):
            pass
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)}); on Debian: apt-get install chromium")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def open_page(browser: Browser, path: Path, comparison) -> None:
    """Write the page, open it, wait until both plots are drawn."""
    write_html(comparison, path)
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(path)
    browser.wait("document.querySelectorAll('#finals .trace').length > 0")


@pytest.fixture
def comparison(tmp_path):
    """Three groups of two, two and one seeds."""
    seeds_of(tmp_path, "plain", [3.00, 3.10])
    seeds_of(tmp_path, "changed", [2.7, 2.9], "--normalization=rmsnorm", step_ms=30.0)
    seeds_of(tmp_path, "single", [2.95], "--norm_position=post", "--learning_rate=1e-5")
    return compare(group_runs(load_runs([tmp_path])))


TRACES = "document.getElementById('curves').data"
CLICK = "document.querySelector({!r}).click()"


def choose(browser: Browser, loss: str) -> None:
    browser.run(
        f"(select => {{ select.value = '{loss}'; select.dispatchEvent(new Event('change')); }})(document.getElementById('loss'))"
    )


# The page.


def test_the_page_is_whole_by_itself_draws_its_plots_and_complains_of_nothing(browser, tmp_path, comparison):
    path = tmp_path / "report.html"
    open_page(browser, path, comparison)
    for plot in ("curves", "finals"):
        box = browser.run(
            f"(box => [box.width, box.height])(document.querySelector('#{plot} .main-svg').getBoundingClientRect())"
        )
        assert min(box) > 100
    lines = browser.run(
        "[...document.querySelectorAll('#curves .scatterlayer .js-line')].map(line => line.getBoundingClientRect().width)"
    )
    assert len(lines) == 5 + 2 and min(lines) > 100  # a line a run, and the means of the two groups that have one
    assert browser.run(f"{TRACES}[0].y.at(-1)") == 2.7
    assert browser.requests == [path.as_uri()] and browser.complaints == []
    buttons = browser.run("[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)")
    assert "Zoom" in buttons and not [title for title in buttons if "hare" in title or "loud" in title]


def test_the_page_may_not_load_anything(browser, tmp_path, comparison):
    open_page(browser, tmp_path / "report.html", comparison)
    assert browser.run("fetch('https://example.org/').then(() => 'loaded', () => 'refused')") == "refused"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


@pytest.mark.parametrize("axis, last", [("tokens", 2560), ("flops", 2_560_000), ("seconds", 1.2)])
def test_the_axis_can_be_tokens_flops_or_time(browser, tmp_path, comparison, axis, last):
    open_page(browser, tmp_path / "report.html", comparison)
    browser.run(CLICK.format(f"input[value={axis}]"))
    words = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time (seconds)"}
    assert browser.run("document.querySelector('#curves .xtitle').textContent") == words[axis]
    assert browser.run(f"{TRACES}[0].x.at(-1)") == pytest.approx(last)
    assert browser.complaints == []


def test_the_axes_can_be_logarithmic(browser, tmp_path, comparison):
    open_page(browser, tmp_path / "report.html", comparison)
    kinds = "['xaxis', 'yaxis'].map(a => document.getElementById('curves')._fullLayout[a].type)"
    assert browser.run(kinds) == ["linear", "linear"]
    for switch, expected in (("#logx", ["log", "linear"]), ("#logy", ["log", "log"]), ("#logx", ["linear", "log"])):
        browser.run(CLICK.format(switch))
        assert browser.run(kinds) == expected


def test_the_loss_can_be_of_validation_training_or_bits_per_byte_and_smoothed(browser, tmp_path, comparison):
    open_page(browser, tmp_path / "report.html", comparison)
    run = comparison.runs[0]
    choose(browser, "train_loss")
    assert browser.run("document.querySelector('#curves .ytitle').textContent") == "training loss"
    smoothed = browser.run(f"{TRACES}[0].y")
    browser.run("(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(document.getElementById('smoothing'))")
    assert browser.run(f"{TRACES}[0].y") == pytest.approx(run.curve["loss"], rel=1e-6)
    weights = [0.8**age for age in range(len(smoothed))]
    expected = sum(w * y for w, y in zip(weights, reversed(run.curve["loss"]))) / sum(weights)
    assert smoothed[-1] == pytest.approx(expected, rel=1e-6)
    choose(browser, "bits_per_byte")
    assert browser.run(f"{TRACES}[0].y") == [1.5] * 4


def test_runs_groups_and_means_can_be_switched_off_and_on(browser, tmp_path, comparison):
    open_page(browser, tmp_path / "report.html", comparison)
    count = f"{TRACES}.length"
    assert browser.run(count) == 7
    browser.run(CLICK.format("#means"))
    assert browser.run(count) == 5
    browser.run("document.querySelectorAll('#runs details')[0].open = true")
    browser.run("document.querySelectorAll('#runs details > label input')[0].click()")  # one run
    assert browser.run(count) == 4
    assert comparison.groups[0].runs[0].name not in browser.run(f"{TRACES}.map(t => t.name).join()")
    browser.run("document.querySelectorAll('#runs summary input')[0].click()")  # its group off …
    assert browser.run(count) == 3
    browser.run("document.querySelectorAll('#runs summary input')[0].click()")  # … and on, wholly
    assert browser.run(count) == 5
    browser.run(CLICK.format("#means"))
    assert browser.run(count) == 7 and browser.complaints == []


def test_the_page_says_what_the_comparison_says(browser, tmp_path, comparison):
    open_page(browser, tmp_path / "report.html", comparison)
    text = browser.run("document.body.innerText")
    for said in (*verdicts(comparison), *comparison.notes, *(run.name for run in comparison.runs), "2.8000 ± 0.1414"):
        assert said in text
    tables = browser.run(
        "[...document.querySelectorAll('table')]"
        ".map(table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText)))"
    )
    models, config = tables[1], tables[2]
    assert {row[0]: row[1:] for row in models[1:]} == {
        "normalization": ["rmsnorm", "layernorm", "layernorm"],
        "norm_position": ["pre", "post", "pre"],
    }  # 2.80, 2.95, 3.05
    assert [row[0] for row in config[1:]] == ["learning_rate"]


def test_names_that_look_like_markup_stay_text(browser, tmp_path):
    seeds_of(tmp_path, "hostile", [3.0, 3.1])
    seeds_of(tmp_path, "plain", [2.0, 2.1], "--normalization=rmsnorm")
    markup = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)> & <b>"
    runs = [dataclasses.replace(run, name=run.name.replace("hostile", markup)) for run in load_runs([tmp_path])]
    open_page(browser, tmp_path / "report.html", compare(group_runs(runs)))
    assert browser.run("document.title") == "kitbash: comparison of runs"
    assert browser.run("document.querySelectorAll('img, b, body script').length") == 2  # the page's own scripts
    assert "</script><script>" in browser.run("document.body.innerText")
    assert browser.complaints == [] and len(browser.requests) == 1


def test_forced_and_unfinished_runs_are_flagged_on_the_page(browser, tmp_path):
    seeds_of(tmp_path, "whole", [3.0, 3.1])
    make_run(tmp_path / "killed", "--normalization=rmsnorm", steps=12, outcome=None)
    make_run(tmp_path / "at_once", "--norm_position=post", steps=2, outcome=None)  # nothing to draw at all
    open_page(browser, tmp_path / "report.html", compare(group_runs(load_runs([tmp_path])), force=True))
    text = browser.run("document.body.innerText")
    assert "[not comparable: unfinished]" in text and "killed or still running after step 10 of 40" in text
    assert browser.complaints == []


# The PNG.


def png(path: Path):
    """A picture as (height, width, 3) numbers from 0 to 1."""
    from matplotlib.image import imread

    return imread(path)[..., :3]


def colored(picture, color: str) -> int:
    """How many pixels have this colour."""
    target = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((abs(picture - target).max(axis=-1) < 0.02).sum())


def test_the_png_has_three_panels_with_every_group_in_each(tmp_path, comparison):
    write_plot(comparison, tmp_path / "loss.png")
    picture = png(tmp_path / "loss.png")
    height, width, _ = picture.shape
    assert width > 1500
    plots = picture[: int(0.75 * height)]  # without the legend
    for number in range(3):
        panel = plots[:, number * width // 3 : (number + 1) * width // 3]
        for color in COLORS[:3]:
            assert colored(panel, color) > 100, (number, color)
        assert colored(panel, COLORS[3]) == 0


def test_the_png_of_runs_without_evaluations_on_the_way_shows_the_training_loss(tmp_path):
    seeds_of(tmp_path, "a", [3.0, 3.1], eval_interval=40)
    make_run(tmp_path / "killed", "--normalization=rmsnorm", steps=12, outcome=None, eval_interval=40, loss=3.5)
    forced = compare(group_runs(load_runs([tmp_path])), force=True)
    write_plot(forced, tmp_path / "loss.png")
    picture = png(tmp_path / "loss.png")
    assert all(colored(picture[: int(0.75 * len(picture))], color) > 100 for color in COLORS[:2])


def test_the_mean_is_drawn_with_its_interval_where_points_match():
    x, mean, low, high = mean_line([([1, 2], [3.0, 2.0]), ([1, 2], [3.2, 2.4])])
    assert x == [1, 2] and mean == pytest.approx([3.1, 2.2])
    half = 12.706204736 * 0.2 / 2  # t of one degree of freedom × sd 0.2/√2 / √2
    assert (low[0], high[0]) == pytest.approx((3.1 - half, 3.1 + half))
    assert mean_line([([1], [3.0])]) is None and mean_line([([1], [3.0]), ([1, 2], [3.0, 2.0])]) is None
