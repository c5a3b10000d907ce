"""The page in a real Chromium. The tests with a real server are slow; one without is quick."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_doubles import picture
from PIL import Image, ImageChops

PROGRAM = Path(__file__).parent / "gateway_process.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Software rendering, because test machines have no GPU.
FLAGS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", *(["--no-sandbox"] if sys.platform == "linux" else [])]
WAIT_MS = 180_000
KEEP_FORM = """
const real = fetch;
window.fetch = (url, options) => { window.sent = options?.body ?? window.sent; return real(url, options); };
"""
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: extra `browser`")

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """A page of a gateway, and what went wrong in it."""

    def __init__(self, browser: Any, url: str, *, width: int = 1280, height: int = 860, **options: Any) -> None:
        self.url, self.wrong, self.foreign = url, list[str](), list[str]()
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        # A decoder of model-viewer tries WebAssembly, which the policy forbids. Our meshes are not compressed and need none.
        self.page.on("pageerror", lambda error: None if "WebAssembly" in str(error) else self.wrong.append(str(error)))
        self.page.on("console", lambda message: self.wrong.append(message.text) if self._is_wrong(message) else None)
        self.page.on("request", lambda request: None if self._is_ours(request.url) else self.foreign.append(request.url))
        self.open()

    def open(self) -> None:
        self.page.goto(self.url)
        self.page.wait_for_selector("#served:not([hidden])")

    def _is_ours(self, url: str) -> bool:
        return url.startswith((self.url, f"blob:{self.url}", "data:"))

    def _is_wrong(self, message: Any) -> bool:
        # model-viewer has one style attribute in a template. The policy blocks it, and the viewer does without.
        known = ("Failed to load resource", "WebGL", "Applying inline style violates")
        return message.type == "error" and not any(words in message.text for words in known)

    def make(self, words: str | None = None, *, steps: str = "", resolution: str = "64") -> None:
        self.page.evaluate("document.querySelector('details').open = true")
        self.page.select_option("#resolution", resolution)
        self.page.fill("#steps", steps)
        if words is not None:
            if self.page.is_visible("#tab-words"):
                self.page.click("#tab-words")
            self.page.fill("#prompt", words)
        self.page.click("#go")

    def done(self) -> None:
        self.page.wait_for_selector("#stage[data-state=done]")

    def check(self) -> None:
        assert (self.wrong, self.foreign) == ([], []), "no error in the console, nothing from other hosts"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a gateway whose meshes need no server and take half a second."""
    with running(tmp_path_factory.mktemp("quick"), 0.5) as url:
        yield url


@contextlib.contextmanager
def running(folder: Path, seconds: float) -> Iterator[str]:
    command = [sys.executable, str(PROGRAM), str(folder / "log"), str(seconds), f"data={json.dumps(str(folder / 'data'))}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait(timeout=60)
        assert process.stdout is not None
        process.stdout.close()


def test_a_picture_becomes_a_mesh_that_can_be_taken_away(browser: Any, quick: str) -> None:
    """The quick one: picture in, viewer, download equal to the interface's bytes, an error in words."""
    opened = Page(browser, quick)
    page = opened.page
    page.set_input_files("#file", {"name": "broken.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#problem:not([hidden])")
    assert "not a picture" in page.text_content("#problem-text") and "PNG" in page.text_content("#problem-hint")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_selector("#go:not([disabled])")
    assert page.is_hidden("#problem")
    page.evaluate("document.querySelector('details').open = true")
    page.select_option("#background", "false")
    page.evaluate(KEEP_FORM)
    page.click("#go")
    opened.done()
    assert page.evaluate("window.sent.get('remove_background')") == "false"
    assert "12" in page.text_content("#facts")
    with page.expect_download() as download:
        page.click("#downloads a >> nth=0")
    content = Path(download.value.path()).read_bytes()
    (id,) = page.evaluate("JSON.parse(localStorage.made).map((entry) => entry.id)")
    answer = page.request.get(f"{quick}/v1/meshes/{id}/content")
    assert content == answer.body() and content[:4] == b"glTF"
    opened.check()
    opened.context.close()


@pytest.mark.slow
def test_the_viewer_shows_the_mesh(browser: Any, quick: str) -> None:
    opened = Page(browser, quick)
    while not opened.page.evaluate("customElements.get('model-viewer') !== undefined"):  # wait_for_function needs eval
        opened.page.wait_for_timeout(100)
    opened.page.evaluate("document.getElementById('stage').dataset.state = 'done'")
    opened.page.wait_for_timeout(1500)
    empty = pixels(opened)
    opened.page.evaluate("document.getElementById('stage').dataset.state = 'empty'")
    opened.make("torus")
    opened.done()
    least, changed = 0.02 * empty.width * empty.height, 0
    for _ in range(40):  # software rendering takes its time
        difference = ImageChops.difference(empty, pixels(opened)).convert("L").point(lambda value: 255 * (value > 12))
        if (changed := difference.histogram()[255]) > least:
            break
        opened.page.wait_for_timeout(500)
    assert changed > least, "pixels must differ from the empty view"
    opened.check()
    opened.context.close()


def pixels(opened: Page) -> Image.Image:
    """The upper part of the viewer, over which nothing else lies."""
    image = Image.open(io.BytesIO(opened.page.locator("#viewer").screenshot())).convert("RGB")
    return image.crop((0, 0, image.width, int(0.75 * image.height)))


@pytest.mark.slow
def test_cancel_and_reload(browser: Any, tmp_path: Path) -> None:
    with running(tmp_path, 6.0) as url:
        opened = Page(browser, url)
        opened.make("torus")
        opened.page.wait_for_selector("#progress:not([hidden])")
        opened.page.click("#cancel")
        opened.page.wait_for_selector("#stage[data-state=empty]")
        assert opened.page.is_hidden("#progress") and opened.page.is_hidden("#problem")
        opened.make("cone")
        opened.page.wait_for_selector("#progress:not([hidden])")
        opened.open()
        opened.page.wait_for_selector("#progress:not([hidden])")
        opened.done()
        assert len(opened.page.evaluate("JSON.parse(localStorage.made)")) == 1
        opened.context.close()
    stopped = [json.loads(line)[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert stopped.count("stopped") == 1 and stopped.count("made") == 1


@pytest.mark.slow
def test_the_keyboard_and_a_phone(browser: Any, quick: str) -> None:
    opened = Page(browser, quick, width=390, height=844, has_touch=True, is_mobile=True)
    page = opened.page
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], "nothing is wider than the screen"
    page.focus("#tab-picture")
    page.keyboard.press("ArrowRight")
    page.focus("#prompt")
    page.keyboard.type("torus")
    page.keyboard.press("Enter")
    opened.done()
    small = page.evaluate(
        "[...document.querySelectorAll('button, #downloads a, select')].filter((e) => e.offsetParent && e.offsetHeight < 26).length"
    )
    assert small == 0, "targets are large enough for a finger"
    opened.check()
    opened.context.close()


@pytest.mark.slow
@pytest.mark.served
def test_progress_moves_before_a_real_server(browser: Any, endpoints: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hunyuan3d_gateway", "--servers", endpoints.grpc, "--port", "0", "--data", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        opened = Page(browser, process.stdout.readline().strip())
        opened.make("two flat tori", steps="40")
        seen: list[int] = []
        while opened.page.get_attribute("#stage", "data-state") != "done":
            seen.append(int(opened.page.get_attribute("#bar", "aria-valuenow") or 0))
            opened.page.wait_for_timeout(100)
        assert seen == sorted(seen) and len(set(seen)) > 5
        opened.check()
        opened.context.close()
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert process.stdout is not None
        process.stdout.close()
