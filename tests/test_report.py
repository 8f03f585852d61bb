"""report.html: exact frames, safe text, honest gaps; and the page itself, driven in headless Chromium."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import logging
import math
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
import torch
from waiting import PATIENCE_S

from vtok.evaluation.charts import Level, Series, bars, chart, linear_ticks, log_ticks
from vtok.evaluation.report import write_report
from vtok.evaluation.sprites import sprite, sprite_columns

BUDGETS = (1, 4, 16)
NASTY = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>&\u2028 {{js}} \"quoted\""


def moving_square(*, frames: int = 8, size: int = 32, seed: int = 0) -> np.ndarray:
    """[T, H, W, 3] uint8: a bright square that moves over noise, different in every frame."""
    rng = np.random.default_rng(seed)
    video = np.repeat(rng.integers(0, 90, (1, size, size, 3), dtype=np.uint8), frames, axis=0)
    for t in range(frames):
        video[t, 4 : 4 + size // 4, 2 * t : 2 * t + size // 4] = (250, 200 - 10 * t, 30 + 20 * seed)
    return video


def coarse(video: np.ndarray, cells: int) -> np.ndarray:
    """The video with cells x cells mean colours a frame."""
    frames, height, width, _ = video.shape
    blocks = video.reshape(frames, cells, height // cells, cells, width // cells, 3).mean((2, 4))
    return blocks.repeat(height // cells, 1).repeat(width // cells, 2).round().astype(np.uint8)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / ((a.astype(float) - b.astype(float)) ** 2).mean())


def make_clips(count: int = 3, *, caption: str = "a square moves right") -> list[dict]:
    clips = []
    for i in range(count):
        video = moving_square(seed=i)
        versions: dict = {k: coarse(video, int(k**0.5)) for k in BUDGETS}
        versions["x264"] = coarse(video, 8)
        clips.append(
            {
                "key": f"clip{i}",
                "caption": caption,
                "original": torch.from_numpy(video) if i % 2 else video,
                "reconstructions": versions,
                "psnr_db": {label: psnr_db(version, video) for label, version in versions.items()},
                "tags": ["worst"] if i == 0 else ["best"] if i == 1 else [],
                "fps": 8.0,
            }
        )
    return clips


def make_evaluation(clips: list[dict]) -> dict:
    """eval.json of the clips above: our budgets, a control at the same bits, a codec with a floor, an undefined row."""
    rows = []
    for k in BUDGETS:
        score = float(np.mean([clip["psnr_db"][k] for clip in clips]))
        shared = {"budget": k, "tokens_mean": float(k), "bits_mean": 16.0 * k, "bits_per_pixel": 16 * k / (8 * 32 * 32)}
        rows.append(
            {
                "method": "flexible",
                **shared,
                "psnr_db": score,
                "ssim": 0.1 * k**0.5,
                "psnr_db_ci": [score - 1, score + 1],
            }
        )
        rows[-1]["usage_per_position"] = [1.0 / (1 + i) for i in range(k)]
        rows.append({"method": "dct", **shared, "psnr_db": score - 0.7, "ssim": None, "note": None})
    rows.append({"method": "x264", "budget": None, "tokens_mean": None, "bits_mean": 4096, "bits_per_pixel": 0.5})
    rows[-1] |= {"psnr_db": 31.0, "ssim": 0.9, "note": "its floor"}
    rows.append(
        {"method": "av1", "budget": 1, "bits_per_pixel": None, "psnr_db": float("nan"), "note": "<i>no frame</i>"}
    )
    return {"schema": 1, "model": "runs/tiny", "family": "flexible", "shards": "s", "clips": len(clips), "rows": rows}


def history() -> list[dict]:
    lines = [{"step": s, "train/loss": math.exp(-s / 20), "train/lr": 1e-3} for s in range(0, 100, 5)]
    return [*lines, {"step": 0, "val/psnr_db": 12.0}, {"step": 99, "val/psnr_db": 20.0, "val/fvd": None}]


class Page(HTMLParser):
    """Collects the tags with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def test_sprites_hold_the_exact_frames():
    frames = np.random.default_rng(0).integers(0, 256, (13, 34, 900, 3), dtype=np.uint8)
    columns = sprite_columns(13, 900)
    assert columns == 4  # folded into rows at 4096 pixels
    with av.open(io.BytesIO(sprite(frames)), format="webp_pipe") as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert image.shape == (4 * 34, 4 * 900, 3)
    for i, frame in enumerate(frames):
        y, x = 34 * (i // columns), 900 * (i % columns)
        assert np.array_equal(image[y : y + 34, x : x + 900], frame)


def test_a_sprite_too_large_for_webp_says_so():
    with pytest.raises(ValueError, match=r"600 frames of 2048x64 .* fewer or smaller frames"):
        sprite(np.zeros((600, 64, 2048, 3), np.uint8))


def test_page_embeds_every_version_and_needs_no_network(tmp_path):
    clips = make_clips()
    path = write_report(make_evaluation(clips), clips, tmp_path / "deep" / "report.html", history=history())
    text = path.read_text()
    page = Page(text)
    stored = json.loads(page.scripts[0])
    assert [clip["key"] for clip in stored] == ["clip0", "clip1", "clip2"]
    assert [v["label"] for v in stored[0]["versions"]] == ["1", "4", "16", "x264"]
    data = base64.b64decode(stored[1]["versions"][1]["source"].split(",")[1])
    with av.open(io.BytesIO(data), format="webp_pipe") as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(image, np.concatenate(list(clips[1]["reconstructions"][4]), axis=1))
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text


def test_untrusted_text_stays_text(tmp_path):
    clips = make_clips(caption=NASTY)
    evaluation = make_evaluation(clips)
    evaluation |= {"model": NASTY, "shards": NASTY, "environment": {NASTY: NASTY}, "family": NASTY}
    evaluation["rows"] = [{**row, "note": NASTY, "method": NASTY, NASTY: 1.0} for row in evaluation["rows"]]
    lines = [{**line, f"train/{NASTY}": float(i)} for i, line in enumerate(history())]
    path = write_report(evaluation, clips, tmp_path / "report.html", history=lines)
    page = Page(path.read_text())
    assert len(page.scripts) == 2 and not any(tag in ("img", "i") for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert json.loads(page.scripts[0])[0]["caption"] == NASTY
    assert path.read_text().count('"use strict";') == 1  # {{js}} inside a caption was not filled in


def test_undefined_values_are_dashes_with_their_note(tmp_path):
    clips = make_clips(1)
    text = write_report(make_evaluation(clips), [], tmp_path / "r.html").read_text()
    table = text[text.index("<table") : text.index("</table>")]
    last = table.split("<tr")[-1]
    assert "nan" not in table.lower()
    assert last.count("&ndash;") >= 3 and "&lt;i&gt;no frame&lt;/i&gt;" in last
    assert 'id="player"' not in text and "report" not in Page(text).scripts[0]


def test_numbers_of_every_clip_stay_in_eval_json(tmp_path):
    evaluation = make_evaluation(make_clips(1)) | {"per_clip": {"keys": ["a-key-of-thousands"], "psnr_db": {}}}
    text = write_report(evaluation, [], tmp_path / "r.html").read_text()
    assert "a-key-of-thousands" not in text and "per_clip" not in text


@pytest.mark.parametrize("rows", [[], [{"method": "flexible", "budget": 4, "tokens_mean": 4.0, "psnr_db": 21.5}]])
def test_empty_evaluations_and_those_of_one_row(tmp_path, rows):
    text = write_report({"family": "flexible", "rows": rows}, [], tmp_path / "r.html").read_text()
    assert ("PSNR, dB against tokens" in text) == bool(rows)
    assert ("<table" in text) == bool(rows)


def test_a_report_over_its_size_turns_lossy_and_says_so(tmp_path, caplog):
    clips = make_clips()
    for clip in clips:  # noise, which only a lossy image makes smaller
        clip["original"] = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    exact = write_report(make_evaluation(clips), clips, tmp_path / "a.html")
    lossy = write_report(make_evaluation(clips), clips, tmp_path / "b.html", max_bytes=100_000)
    assert "stored losslessly" in exact.read_text()
    assert "lossy WebP" in lossy.read_text() and lossy.stat().st_size < exact.stat().st_size
    with caplog.at_level(logging.WARNING):
        write_report(make_evaluation(clips), clips, tmp_path / "c.html", max_bytes=1000)
    assert "max_bytes=1000" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"original": np.zeros((4, 8, 8), np.uint8)}, r"clip 'clip0' original is uint8 \[4, 8, 8\], expected uint8"),
        ({"original": np.zeros((4, 8, 8, 3), np.float32)}, r"original is float32"),
        ({"reconstructions": {4: np.zeros((4, 8, 8, 3), np.uint8)}}, r"clip 'clip0' 4 is \[4, 8, 8, 3\], the original"),
        ({"fps": 0}, r"clip 'clip0' fps=0 is not a positive"),
        ({"fps": None}, r"fps=None"),
    ],
)
def test_bad_clips_are_named(tmp_path, change, message):
    clips = make_clips(1)
    clips[0] |= change
    with pytest.raises(ValueError, match=message):
        write_report(make_evaluation(make_clips(1)), clips, tmp_path / "r.html")


def test_ticks_are_round_and_inside():
    assert linear_ticks(0.0, 10.0, 5) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(17.3, 31.2) == [18, 20, 22, 24, 26, 28, 30] or linear_ticks(17.3, 31.2) == [
        17.5,
        20,
        22.5,
        25,
        27.5,
        30,
    ]
    assert linear_ticks(3.0, 3.0) == [3.0]
    assert log_ticks(0.001, 1.0) == pytest.approx([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])
    assert log_ticks(1e-9, 1e9)[0] >= 1e-9 and len(log_ticks(1e-9, 1e9)) <= 8


def test_chart_places_points_in_order_and_drops_what_a_log_axis_cannot_show():
    drawn = chart(
        [Series("a", [(0.0, 1.0, "never"), (0.01, 20.0, "low"), (1.0, 30.0, "high")], 0)],
        x_title="rate",
        y_title="PSNR",
        log_x=True,
    )
    circles = ElementTree.fromstring(drawn).findall(".//circle")
    (x0, y0), (x1, y1) = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in circles]
    assert x0 < x1 and y1 < y0 and "never" not in drawn
    assert chart([Series("a", [(0.0, 1.0, "")], 0)], x_title="x", y_title="y", log_x=True) == ""


def test_ten_methods_differ_without_colour_and_levels_cross_the_chart():
    lines = [Series(str(i), [(1.0, float(i), "a"), (2.0, float(i), "b")], i) for i in range(10)]
    level = Level("all tokens", 12.0, 3, "12 %", band=(11.0, 14.0))
    drawn = ElementTree.fromstring(chart(lines, x_title="x", y_title="y", levels=[level]))
    shapes = set()
    for number in range(10):
        group = next(g for g in drawn.iter("g") if g.get("data-series") == str(number))
        mark = next(e for e in group.iter() if "mark" in (e.get("class") or ""))
        corners = [pair.split(",") for pair in (mark.get("points") or "").split()]
        x = min(float(px) for px, _ in corners) if corners else 0.0
        y = min(float(py) for _, py in corners) if corners else 0.0
        outline = tuple((round(float(px) - x), round(float(py) - y)) for px, py in corners)
        shapes.add((mark.tag, outline, mark.get("class")))
    assert len(shapes) == 10
    across = next(g for g in drawn.iter("g") if g.get("data-series") == "all tokens")
    line, band = across.find("line"), across.find("rect")
    assert line is not None and band is not None
    top, tall, y = float(band.get("y", "")), float(band.get("height", "")), float(line.get("y1", ""))
    assert (y - top) / tall == pytest.approx(2 / 3, abs=0.02)  # 12 lies a third above 11 of 11 to 14
    assert float(line.get("x2", "")) - float(line.get("x1", "")) > 450


def test_bars_leave_gaps_for_undefined_positions():
    heights = [
        float(r.get("height", "")) for r in ElementTree.fromstring(bars([1.0, math.nan, 0.5], title="u")).iter("rect")
    ]
    assert len(heights) == 2 and heights[0] == pytest.approx(2 * heights[1], abs=0.02)
    assert bars([math.nan], title="u") == ""


def test_curves_of_one_metric_share_a_chart(tmp_path):
    lines = [
        {
            "step": s,
            "train/loss": 100.0 / (s + 1),
            "val/psnr_db_1": 10.0 + s,
            "val/psnr_db_16": 20.0 + s,
            "val/clips": 5,
        }
        for s in range(0, 60, 10)
    ]
    text = write_report(
        {"family": "flexible"}, [], tmp_path / "r.html", history=[*lines, {"step": 60, "train/loss": None}]
    ).read_text()
    training = text[text.index('id="history-title"') :]
    captions = re.findall("<figcaption>(.*?)</figcaption>", training)
    assert captions == ["psnr_db by budget, val", "loss (train)", "clips (val)"]  # what never changes comes last
    first = training[training.index('<svg class="chart"') :].split("</svg>")[0]
    assert re.findall('<text class="end"[^>]*>([^<]*)<', first) == ["1", "16"]
    assert "val/psnr_db_16 70 at step 50" in first
    assert (
        "history-title" not in write_report({}, [], tmp_path / "e.html", history=[{"step": 1, "loss": 2.0}]).read_text()
    )


class Browser:
    """Headless Chromium on a DevTools pipe: JSON messages ending in a zero byte, no port and no client library."""

    # fd 3 is read and fd 4 is written by the browser; a helper puts them there, since Popen cannot
    LAUNCH = (
        "import os, sys; r, w = map(int, sys.argv[1:3]); "
        "os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
    )
    FLAGS = (
        "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
    )

    def __init__(self, binary: str) -> None:
        self.profile = tempfile.mkdtemp(prefix="vtok-browser-")
        to_read, self.write_fd = os.pipe()
        self.read_fd, to_write = os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_read, to_write)]
        command = [sys.executable, "-c", self.LAUNCH, *map(str, theirs), binary, *self.FLAGS.split()]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for fd in (to_read, to_write, *theirs):
            os.close(fd)
        self.buffer, self.count, self.events = b"", 0, []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = ""
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, *, timeout_s: float = PATIENCE_S, **params: object) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if getattr(self, "session", ""):
            message["sessionId"] = self.session
        os.write(self.write_fd, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout_s
        while True:
            while b"\0" in self.buffer:
                raw, self.buffer = self.buffer.split(b"\0", 1)
                answer = json.loads(raw)
                if answer.get("id") == self.count:
                    assert "error" not in answer, answer
                    return answer["result"]
                self.events.append(answer)
            if not select.select([self.read_fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"{method} had no answer in {timeout_s} s")
            chunk = os.read(self.read_fd, 1 << 20)
            assert chunk, f"the browser ended (exit status {self.process.poll()}) during {method}"
            self.buffer += chunk

    def js(self, expression: str) -> object:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str, *, timeout_s: float = PATIENCE_S) -> object:
        deadline = time.monotonic() + timeout_s
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)
        return value

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def key(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path, *, whole: bool = False) -> bytes:
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])
        path.write_bytes(data)
        return data

    def problems(self) -> list[dict]:
        """Uncaught exceptions, console errors and warnings, and requests that left the file."""
        self.js("1")
        bad = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                bad.append(params["exceptionDetails"])
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                bad.append(params)
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                bad.append(params["entry"])
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                bad += [] if url.startswith(("file:", "data:", "about:")) else [params["request"]]
        return bad

    def close(self) -> None:
        try:
            os.killpg(self.process.pid, 9)
        except ProcessLookupError:
            pass
        self.process.wait(30)
        os.close(self.read_fd)
        os.close(self.write_fd)
        shutil.rmtree(self.profile, ignore_errors=True)


@pytest.fixture(scope="module")
def browser():
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    binary = next((found for name in names if name and (found := shutil.which(name))), None)
    if binary is None:
        reason = "NO BROWSER: report.html was NOT looked at; install chromium (Debian: apt-get install chromium)"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    chromium = Browser(binary)
    yield chromium
    chromium.close()


RECONSTRUCTION = "document.getElementById('reconstruction')"
# read from a copy: reading the page's own canvas back would draw a performance warning
PIXELS = """(() => {{ const c = document.getElementById("{0}"), copy = document.createElement("canvas");
  copy.width = c.width; copy.height = c.height;
  const context = copy.getContext("2d", {{ willReadFrequently: true }});
  context.drawImage(c, 0, 0);
  return {{ frame: Number(c.dataset.frame), label: c.dataset.label, width: c.width,
    rgb: [...context.getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 < 3) }}; }})()"""


@pytest.mark.slow
def test_the_player_plays_exact_frames_and_the_slider_switches_versions(tmp_path, browser):
    clips = make_clips()
    path = write_report(make_evaluation(clips), clips, tmp_path / "report.html", history=history())
    browser.events.clear()
    browser.open(path)

    browser.wait(f"{RECONSTRUCTION}.dataset.frame !== undefined")
    seen = set()
    deadline = time.monotonic() + PATIENCE_S
    while len(seen) < 6 and time.monotonic() < deadline:
        seen.add(browser.js(f"{RECONSTRUCTION}.dataset.frame"))
    assert len(seen) >= 6, f"frames do not advance: saw {seen} of 8"

    browser.js("document.getElementById('play').click()")
    browser.js("document.getElementById('tokens').focus()")
    browser.key("Home", 36)
    shown = {}
    for k in BUDGETS:
        word = "token" if k == 1 else "tokens"
        browser.wait(f"document.getElementById('readout').textContent.startsWith('{k} {word}, ')")
        browser.wait(f"{RECONSTRUCTION}.dataset.label === '{k}' && {RECONSTRUCTION}.dataset.frame !== undefined")
        left, right = browser.js(PIXELS.format("original")), browser.js(PIXELS.format("reconstruction"))
        frame = left["frame"]
        assert right["label"] == str(k) and right["frame"] == frame and right["width"] == 32
        assert left["rgb"] == clips[0]["original"][frame].ravel().tolist()
        assert right["rgb"] == clips[0]["reconstructions"][k][frame].ravel().tolist()
        score = browser.js("document.getElementById('shown-score').textContent")
        assert score == f"{clips[0]['psnr_db'][k]:.2f} dB"
        assert browser.js("document.getElementById('tokens').getAttribute('aria-valuetext')").startswith(f"{k} {word}")
        shown[k] = (frame, right["rgb"])
        browser.key("ArrowRight", 39)
    assert len({frame for frame, _ in shown.values()}) == 1  # paused: switching keeps the time
    assert shown[1][1] != shown[4][1] != shown[16][1]

    browser.js("document.querySelector('#others button').click()")
    assert browser.js("document.getElementById('shown-name').textContent") == "x264"
    browser.js("document.querySelectorAll('.gallery button')[1].click()")
    browser.wait("document.getElementById('clip-key').textContent.includes('clip1')")
    browser.js("const t = document.getElementById('time'); t.value = 5; t.dispatchEvent(new Event('input')); 1")
    browser.wait("document.getElementById('original').dataset.frame === '5'")
    assert browser.js(PIXELS.format("original"))["rgb"] == clips[1]["original"][5].flatten().tolist()
    assert browser.problems() == []


@pytest.mark.slow
def test_the_page_sorts_hides_and_fits(tmp_path, browser):
    clips = make_clips()
    path = write_report(make_evaluation(clips), clips, tmp_path / "report.html", history=history())
    browser.events.clear()
    browser.open(path)
    column = "[...document.querySelectorAll('tbody td:nth-child({0})')].map((c) => c.dataset.value)"
    headings = browser.js("[...document.querySelectorAll('thead th')].map((h) => h.textContent)")
    place = headings.index("PSNR dB") + 1
    for direction in ("ascending", "descending"):
        browser.js(f"document.querySelector('thead th:nth-child({place}) button').click()")
        values = [float(v) for v in browser.js(column.format(place)) if v != ""]
        assert values == sorted(values, reverse=direction == "descending")
        assert browser.js(column.format(place))[-1] == ""  # undefined stays last
    browser.js("document.querySelector('.legend button[data-series=dct]').click()")
    hidden = "[...document.querySelectorAll('#rates svg.chart .series[data-series=dct]')]"
    assert set(browser.js(f"{hidden}.map((g) => getComputedStyle(g).display)")) == {"none"}
    pictures = {}
    for name, width, dark in (("light", 1200, False), ("dark", 1200, True), ("phone", 390, False)):
        browser.open(path, width=width, dark=dark)
        browser.wait(f"{RECONSTRUCTION}.dataset.frame !== undefined")
        assert browser.js("document.documentElement.scrollWidth - innerWidth") <= 0, f"{name}: scrolls sideways"
        pictures[name] = browser.screenshot(tmp_path / f"{name}.png")
        assert len(pictures[name]) > 10_000
    brightness = {}
    for name, data in pictures.items():
        with av.open(io.BytesIO(data), format="png_pipe") as container:
            brightness[name] = next(container.decode(video=0)).to_ndarray(format="rgb24").mean()
    assert brightness["light"] > 150 > 80 > brightness["dark"]
    assert browser.problems() == []


@pytest.mark.slow
def test_captions_cannot_run_code(tmp_path, browser):
    clips = make_clips(caption=NASTY)
    path = write_report({**make_evaluation(clips), "model": NASTY}, clips, tmp_path / "report.html")
    browser.events.clear()
    browser.open(path)
    browser.wait(f"{RECONSTRUCTION}.dataset.frame !== undefined")
    assert browser.js("window.hacked") is None
    assert NASTY in str(browser.js("document.getElementById('caption').textContent"))
    assert re.search("img", str(browser.js("document.querySelector('h1').innerHTML"))) and browser.problems() == []


def test_bits_beside_codecs(tmp_path):
    """BD-rate where curves overlap, matched bits by budget, a floor, and what was not reached."""
    from vtok.evaluation.rows import against_codec

    curve = [(1000.0, 20.0), (2000.0, 23.0), (4000.0, 26.0)]
    ours = [(1, 100.0, 12.5), (4, 800.0, 21.5), (16, 1600.0, 24.5), (64, 3200.0, 27.5)]
    entries = against_codec("x265", curve, {"bits_mean": ours, "ar_bits_mean": ours[:1]})
    assert entries[0]["bd_rate_percent"] == pytest.approx(100 * (800 / (1000 * 2**0.5) - 1))
    assert entries[0]["overlap_psnr_db"] == pytest.approx([20, 26]) and entries[1]["bd_rate_percent"] is None
    evaluation = make_evaluation(make_clips(1))
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries
    text = write_report({**evaluation, "against_codecs": entries}, [], tmp_path / "r.html").read_text()
    section = text[text.index("Bits beside codecs") :].split("</section>")[0]
    assert "\N{MINUS SIGN}43." in section and "20.00 to 26.00 dB" in section and "none in common" in section
    for words in ("floor: 1,000 bits, 10x", "1,414 bits, 1.77x", "2,828 bits, 1.77x", "not reached", "64 tokens"):
        assert words in section, words
    assert "Bits beside codecs" not in write_report(evaluation, [], tmp_path / "r.html").read_text()
    assert "codec_curve" not in text, "eval.json holds the points"
