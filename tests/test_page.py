"""The web page: the real one, of the real server with nano, in headless Chromium with a file as its microphone."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

try:
    from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright
except ImportError:
    sync_playwright = None

DATA = Path(__file__).resolve().parent / "data"
PAGE = Path(__file__).resolve().parent.parent / "minimind_o_hf" / "server" / "page"
KEY = "key-of-the-page-tests"
HOW_TO_INSTALL = (
    "NO CHROMIUM: the tests of the web page were not run. Install it (`apt install chromium`, or `playwright install "
    "chromium`) and its driver (`pip install playwright`). MINIMIND_O_BROWSER=required makes this an error."
)
# What a test's own doing makes the browser print: requests that are refused, and lines that are cut.
REFUSED = re.compile(r"Failed to load resource|WebSocket connection to")


# ---------------------------------------------------------------- browser, server, pages


# A minute and a half: `.ci/run` runs them after the others.
pytestmark = pytest.mark.slow


def chromium_path(playwright: "Playwright") -> str | None:
    """Chromium of the system, or else playwright's own."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


@pytest.fixture(scope="module")
def playwright() -> Iterator["Playwright"]:
    if sync_playwright is None:
        pytest.skip(HOW_TO_INSTALL)
    with sync_playwright() as driver:
        if chromium_path(driver) is None:
            pytest.skip(HOW_TO_INSTALL)
        yield driver


def test_chromium_can_be_found():
    if sync_playwright is not None:
        with sync_playwright() as driver:
            if chromium_path(driver):
                return
    if os.environ.get("MINIMIND_O_BROWSER") == "required":
        pytest.fail(HOW_TO_INSTALL)
    warnings.warn(HOW_TO_INSTALL, stacklevel=1)
    pytest.skip(HOW_TO_INSTALL)


def launch(playwright: "Playwright", *options: str) -> "Browser":
    # Without its sandbox, Chromium runs as root too, as in a container.
    return playwright.chromium.launch(
        executable_path=chromium_path(playwright),
        args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required", *options],
    )


@pytest.fixture(scope="module")
def browser(playwright, tmp_path_factory) -> Iterator["Browser"]:
    """A browser whose microphone hears a question again and again, at times while the last one is being answered."""
    question, rate = soundfile.read(DATA / "flite_where_does_a_pig_live.flac", dtype="float32")
    microphone = tmp_path_factory.mktemp("microphone") / "question.wav"
    pauses = [np.zeros(int(seconds * rate), np.float32) for seconds in (0.5, 1.5, 1.8)]
    sound = np.concatenate([pauses[0], question, pauses[1], question, pauses[2]])
    soundfile.write(microphone, sound, rate, subtype="PCM_16")
    recording = f"--use-file-for-fake-audio-capture={microphone}"
    instance = launch(playwright, "--use-fake-device-for-media-stream", recording)
    yield instance
    instance.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """Address of a server with nano and an empty library of voices."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "minimind_o_hf", "serve", "--port", str(port), "--api-key", KEY]
    settings = {"MINIMIND_O_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | settings)
        try:
            _wait_until_ready(process, url, folder / "log.txt")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def _wait_until_ready(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the server does not start:\n{log.read_text(encoding='utf-8')}")


class Visit:
    """An open page, and what its console said."""

    def __init__(
        self, browser: "Browser", url: str, permissions=("microphone", "camera"), serve=None, sockets=None, **options
    ):
        options = {"viewport": {"width": 1100, "height": 760}, "locale": "en-GB", **options}
        self.context = browser.new_context(permissions=list(permissions), **options)
        if serve is not None:
            self.context.route("**/*", serve)
        if sockets is not None:
            self.context.route_web_socket("**/*", sockets)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"exception: {error}"))
        self.page.goto(url)

    def get(self, name: str):
        """A number of `window.minimindO`."""
        return self.page.evaluate(f"window.minimindO?.{name}")

    def until(self, true: Callable[[], bool], seconds: float = 30) -> None:
        # The page's policy forbids `eval`, with which playwright's `wait_for_function` waits.
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"not within {seconds} s: {self.state()}"
            self.page.wait_for_timeout(50)

    def state(self) -> dict:
        numbers = self.page.evaluate("Object.fromEntries(Object.keys(minimindO).map((key) => [key, minimindO[key]]))")
        return numbers | {"notices": self.page.inner_text("#notices"), "log": self.page.inner_text("#log")}

    def online(self) -> "Visit":
        self.until(lambda: self.get("connection") == "online")
        expect(self.page.locator("#voice")).not_to_be_empty()
        return self

    def answered(self, number: int = 1) -> str:
        """Text of an answer, once all of it came and was played."""
        answer = self.page.locator("#log .assistant").nth(number - 1)
        expect(answer).to_be_visible(timeout=30_000)
        self.until(lambda: not self.get("answering") and not self.get("playing"))
        return answer.locator("p").first.inner_text()


@pytest.fixture
def visit(browser, server):
    """Opens pages, and looks at their consoles in the end: no errors, nothing that the content policy stopped."""
    visits = []

    def open_page(path: str = f"/#key={KEY}", base: str = server, chromium=browser, **options) -> Visit:
        visits.append(Visit(chromium, base + path, **options))
        return visits[-1]

    yield open_page
    said = [text for visit in visits for text in visit.said]
    for opened in visits:
        opened.context.close()
    assert said == []


# ---------------------------------------------------------------- talking


def test_typed_question_is_answered_in_text_and_sound(visit):
    chat = visit().online()
    assert chat.get("samplesPlayed") == 0
    chat.page.fill("#text", "Where does a lion live?")
    chat.page.press("#text", "Enter")
    text = chat.answered()
    assert len(text) > 5
    assert chat.page.locator("#log .user p").inner_text() == "Where does a lion live?"
    assert chat.get("samplesPlayed") > 24000 / 2
    assert chat.get("rms") > 0.01
    assert 0 < chat.get("firstSoundMs") < 20_000
    expect(chat.page.locator("#log .assistant .meta")).to_have_text(re.compile(r"^First sound after \d+\.\d\d s$"))
    assert chat.page.locator("#announcer").inner_text().endswith(text)
    chat.page.fill("#text", "What is two plus three?")
    chat.page.click("#send")
    assert len(chat.answered(2)) > 1
    assert chat.page.locator("#log .break").count() == 0


def test_spoken_question_is_answered_hands_free(visit):
    chat = visit().online()
    chat.page.click("#hands-free")
    expect(chat.page.locator("#log .user .spoken").first).to_be_visible(timeout=20_000)
    chat.until(lambda: chat.get("samplesPlayed") > 24000 / 2)
    assert chat.get("rms") > 0.01
    assert len(chat.page.locator("#log .assistant p").first.inner_text()) > 1
    # The recording is 1.7 s long; silence around it is not counted, or not much of it.
    spoken = chat.page.locator("#log .user .spoken").first.inner_text()
    assert 1 < float(re.search(r"[\d.]+", spoken).group()) < 3.5
    chat.page.click("#hands-free")
    assert chat.page.get_attribute("#hands-free", "aria-pressed") == "false"
    sent = chat.get("samplesSent")
    chat.page.wait_for_timeout(200)
    assert chat.get("samplesSent") == sent


def test_speech_interrupts_the_answer(visit):
    chat = visit().online()
    chat.page.click("#hands-free")
    chat.until(lambda: chat.get("interruptions") > 0 and chat.get("heardMs") > 0)
    expect(chat.page.locator("#log .meta", has_text="interrupted after").first).to_be_visible()
    # And the one who interrupted is answered.
    answers = chat.page.locator("#log .assistant").count()
    chat.until(lambda: chat.page.locator("#log .assistant").count() > answers)


def test_stop_button_silences_the_answer(visit):
    chat = visit().online()
    chat.page.fill("#text", "Where does a lion live?")
    chat.page.press("#text", "Enter")
    chat.until(lambda: chat.get("samplesPlayed") > 0)
    chat.page.click("#stop")
    chat.until(lambda: chat.get("interruptions") == 1)
    chat.until(lambda: not chat.get("answering"))
    played = chat.get("samplesPlayed")
    chat.page.wait_for_timeout(200)
    assert chat.get("samplesPlayed") == played
    assert 0 <= chat.get("heardMs") <= played / 24
    assert not chat.page.is_visible("#stop")
    assert chat.get("errors") == 0
    # The conversation goes on.
    chat.page.fill("#text", "Hello!")
    chat.page.press("#text", "Enter")
    assert chat.answered(2)


def test_button_is_held_to_talk(visit):
    chat = visit().online()
    box = chat.page.locator("#talk").bounding_box()
    chat.page.mouse.move(box["x"] + 10, box["y"] + 10)
    chat.page.mouse.down()
    chat.page.wait_for_timeout(2400)
    expect(chat.page.locator("#latency")).to_contain_text("Recording")
    chat.page.mouse.up()
    assert chat.answered()
    assert chat.page.locator("#log .user .spoken").count() == 1
    assert chat.get("errors") == 0


def test_picture_is_answered(visit):
    chat = visit().online()
    chat.page.set_input_files("#picture-file", DATA / "two_blue_circles.png")
    expect(chat.page.locator("#picture img")).to_be_visible()
    chat.page.fill("#text", "How many circles are there?")
    chat.page.press("#text", "Enter")
    assert chat.answered()
    assert chat.page.locator("#log .user img").evaluate("(image) => image.naturalWidth") > 0
    assert chat.page.is_hidden("#picture")
    # One of the camera, with the question spoken.
    chat.page.click("#camera")
    expect(chat.page.locator("#camera-dialog")).to_be_visible()
    chat.until(lambda: chat.page.evaluate("document.querySelector('video').videoWidth") > 0)
    chat.page.click("[data-do=take]")
    size = chat.page.locator("#picture img").evaluate("(image) => Math.max(image.naturalWidth, image.naturalHeight)")
    assert 0 < size <= 512
    chat.page.click("#talk")  # pressed, not held
    chat.page.wait_for_timeout(2400)
    chat.page.click("#talk")
    assert chat.answered(2)
    assert chat.get("errors") == 0


def test_call_is_hands_free_with_captions(visit):
    chat = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True).online()
    chat.page.tap("#call")
    expect(chat.page.locator("#phone")).to_be_visible()
    assert chat.page.locator("#phone").bounding_box() == {"x": 0, "y": 0, "width": 390, "height": 844}
    expect(chat.page.locator("#captions")).not_to_be_empty(timeout=20_000)
    chat.until(lambda: chat.get("samplesPlayed") > 0)
    chat.page.tap("#phone-mute")
    assert chat.page.get_attribute("#phone-mute", "aria-pressed") == "true"
    chat.page.tap("#phone-mute")
    chat.page.tap("#hang-up")
    expect(chat.page.locator("#phone")).to_be_hidden()
    chat.until(lambda: chat.get("handsFree") is False)  # the dialog says that it is closed a moment after it is
    expect(chat.page.locator("#call")).to_be_focused()


# ---------------------------------------------------------------- voices


def test_voice_is_cloned_used_and_deleted(visit):
    chat = visit().online()
    before = chat.page.locator("#voice option").all_inner_texts()
    chat.page.click("#voices")
    chat.page.click("#make-voice")
    expect(chat.page.locator("#clone-problem")).to_have_text("Record something first, or choose a file.")
    chat.page.click("#record")
    expect(chat.page.locator("#recording-time")).to_have_text("0:02")
    expect(chat.page.locator("#recording-advice")).to_contain_text("Too short")
    expect(chat.page.locator("#recording-time")).to_have_text("0:11", timeout=20_000)
    expect(chat.page.locator("#recording-advice")).to_contain_text("Good so far")
    chat.page.click("#record")
    expect(chat.page.locator("#recording-advice")).to_have_text("A good recording.")
    chat.page.click("#make-voice")
    expect(chat.page.locator("#clone-problem")).to_contain_text("at least 10 characters")
    chat.page.fill("#consent", "The speaker is flite, and anybody may clone it.")
    # A name that is taken: the server says so.
    chat.page.fill("#voice-name", before[0])
    chat.page.click("#make-voice")
    expect(chat.page.locator("#clone-problem")).to_contain_text("The server says:")
    chat.page.fill("#voice-name", "pig farmer")
    chat.page.click("#make-voice")
    expect(chat.page.locator("#voices-dialog")).to_be_hidden()
    assert sorted(chat.page.locator("#voice option").all_inner_texts()) == sorted([*before, "pig farmer"])
    assert chat.page.input_value("#voice") == chat.get("voice") == "pig farmer"
    chat.page.fill("#text", "Hello!")
    chat.page.press("#text", "Enter")
    chat.answered()
    assert chat.get("samplesPlayed") > 0
    assert chat.get("errors") == 0
    chat.page.click("#voices")
    for _ in range(2):  # asked once again
        chat.page.click("#own button")
    expect(chat.page.locator("#own")).to_be_hidden()
    assert chat.page.locator("#voice option").all_inner_texts() == before
    # It printed that the server refused the taken name.
    chat.said[:] = [text for text in chat.said if not REFUSED.search(text)]


def test_bad_recordings_are_told(visit, tmp_path):
    chat = visit().online()
    chat.page.click("#voices")
    noise = np.random.default_rng(0).normal(0, 0.05, 24000 * 5)
    for samples, advice in (
        (noise[:24000], "Too short"),
        (noise, "There is noise"),
        (noise / 100, "Too quiet"),
        (np.clip(noise * 50, -1, 1), "clipped"),
        (noise * 0, "no sound"),
    ):
        soundfile.write(tmp_path / "bad.wav", samples, 24000)
        chat.page.set_input_files("#recording-file", tmp_path / "bad.wav")
        expect(chat.page.locator("#recording-advice")).to_contain_text(advice)


# ---------------------------------------------------------------- what may be wrong


def test_says_that_there_is_no_microphone(visit, playwright):
    chromium = launch(playwright)
    try:
        chat = visit(chromium=chromium).online()
        chat.page.click("#call")
        expect(chat.page.locator("#notices")).to_contain_text("No microphone was found")
        assert chat.page.is_hidden("#phone")
        chat.page.click("#camera")
        expect(chat.page.locator("#notices")).to_contain_text("No camera was found")
        chat.page.click("#voices")
        chat.page.click("#record")
        expect(chat.page.locator("#recording-advice")).to_contain_text("No microphone was found")
    finally:
        chromium.close()


def test_says_that_the_page_is_not_secure(visit, server):
    # Another machine's name, without https. The server, which listens here alone, knows no such name.
    other = "http://a-server.test"

    def serve(route) -> None:
        route.fulfill(response=route.fetch(url=route.request.url.replace(other, server)))

    chat = visit(base=other, serve=serve)
    expect(chat.page.locator("#notices")).to_contain_text("Start the server with --https")
    chat.page.fill("#text", "Hello!")
    chat.page.press("#text", "Enter")
    expect(chat.page.locator("#notices")).to_contain_text("Your message is kept")
    chat.said[:] = [text for text in chat.said if not REFUSED.search(text)]


def test_says_that_the_microphone_is_not_allowed(visit):
    chat = visit(permissions=()).online()
    chat.page.click("#talk")
    expect(chat.page.locator("#notices")).to_contain_text("The microphone is not allowed")
    chat.context.grant_permissions(["microphone"])
    chat.page.click("#hands-free")
    chat.until(lambda: chat.get("samplesSent") > 0)
    assert chat.page.locator("#notices").inner_text() == ""


def test_asks_for_the_key_and_keeps_it(visit):
    chat = visit("/")
    expect(chat.page.locator("#key-dialog")).to_be_visible()
    chat.page.fill("#key", "a wrong key")
    chat.page.press("#key", "Enter")
    expect(chat.page.locator("#key-problem")).to_have_text("The server does not accept this key.")
    chat.page.fill("#key", KEY)
    chat.page.press("#key", "Enter")
    chat.online()
    chat.page.reload()
    chat.online()
    chat.said[:] = [text for text in chat.said if not REFUSED.search(text)]
    # Given with the address, it does not stay there.
    assert KEY not in visit().online().page.url


def test_reconnects_and_keeps_what_was_typed(visit):
    chat = visit().online()
    chat.page.fill("#text", "Hello!")
    chat.page.press("#text", "Enter")
    chat.answered()
    chat.context.set_offline(True)
    expect(chat.page.locator("#connection")).to_have_text("Reconnecting")
    expect(chat.page.locator("#notices")).to_contain_text("offline")
    chat.page.fill("#text", "What is two plus three?")
    chat.page.press("#text", "Enter")
    expect(chat.page.locator("#notices")).to_contain_text("Your message is kept")
    chat.context.set_offline(False)
    chat.online()
    assert chat.page.input_value("#text") == "What is two plus three?"
    assert chat.page.locator("#notices").inner_text() == ""
    chat.page.press("#text", "Enter")
    chat.answered(2)
    assert chat.page.locator("#log .break").inner_text() == "The conversation starts anew here"
    chat.said[:] = [text for text in chat.said if not REFUSED.search(text)]


@pytest.mark.parametrize(
    ("code", "closed", "state", "notice"),
    [
        ("server_busy", 1013, "Reconnecting", "The server is busy"),
        ("session_expired", 1001, "Ended", "The server ended the conversation: idle"),
    ],
)
def test_says_why_the_server_closed(browser, server, code, closed, state, notice):
    def refuse(socket) -> None:
        socket.send(json.dumps({"type": "error", "error": {"code": code, "message": "no"}}))
        socket.close(code=closed, reason="idle")

    chat = Visit(browser, f"{server}/#key={KEY}", sockets=refuse)
    expect(chat.page.locator("#connection")).to_have_text(state)
    expect(chat.page.locator("#notices")).to_contain_text(notice)
    chat.context.close()


# ---------------------------------------------------------------- sound at other rates


@pytest.mark.parametrize(("source", "target"), [(48000, 24000), (44100, 24000), (24000, 48000)])
def test_resampling(visit, source, target):
    measured = (
        visit()
        .online()
        .page.evaluate(
            """async ([from, to]) => {
            const { Resampler } = await import("./page/resampler.js");
            const tone = (rate, hertz, length) =>
                Float32Array.from({ length }, (_, index) => Math.sin((2 * Math.PI * hertz * index) / rate));
            const whole = (hertz, size) => {
                const [resampler, sound, pieces] = [new Resampler(from, to), tone(from, hertz, from / 2), []];
                for (let at = 0; at < sound.length; at += size) {
                    pieces.push(...resampler.process(sound.subarray(at, at + size)));
                }
                return pieces;
            };
            const worst = (a, b) => a.reduce((most, value, index) => Math.max(most, Math.abs(value - b[index])), 0);
            const [coarse, fine] = [whole(1000, from), whole(1000, 128)];
            const ideal = tone(to, 1000, to / 2);
            return {
                length: coarse.length / to,
                seam: coarse.length === fine.length ? worst(coarse, fine) : Infinity,
                error: worst(coarse.slice(100, -100), ideal.slice(100)),
                above: Math.max(...whole(0.45 * from, 128).slice(100).map(Math.abs)),
            };
        }""",
            [source, target],
        )
    )
    assert measured["length"] == pytest.approx(0.5, abs=0.002)
    assert measured["seam"] < 1e-6
    assert measured["error"] < 0.01
    if target < source:
        assert measured["above"] < 0.01  # what the lower rate cannot hold is gone, not folded down


# ---------------------------------------------------------------- for everybody


@pytest.mark.parametrize("width", [360, 390, 1100])
def test_nothing_is_cut_off(visit, width):
    chat = visit(viewport={"width": width, "height": 640}).online()
    chat.page.set_input_files("#picture-file", DATA / "two_blue_circles.png")
    chat.page.evaluate("document.querySelector('#stop').hidden = false")  # all buttons at once
    assert chat.page.evaluate("document.documentElement.scrollWidth") == width
    for button in chat.page.locator("header button:visible, header select:visible, footer button:visible").all():
        box = button.bounding_box()
        assert box["x"] >= 0, button
        assert box["x"] + box["width"] <= width, button
        assert min(box["width"], box["height"]) >= 24, button
    chat.page.click("#voices")
    assert chat.page.locator("#voices-dialog").evaluate("(dialog) => dialog.scrollWidth <= dialog.clientWidth")


def test_keyboard_alone(visit):
    chat = visit().online()
    keyboard, focused = chat.page.keyboard, "document.activeElement.id"
    order = []
    while "send" not in order and len(order) < 30:
        keyboard.press("Tab")
        order.append(chat.page.evaluate(focused))
    expected = ["new", "language", "voice", "voices", "text", "file", "camera", "hands-free", "mute", "volume", "call"]
    assert [name for name in order if name in expected] == expected
    chat.page.locator("#voices").focus()
    keyboard.press("Enter")
    expect(chat.page.locator("#record")).to_be_focused()
    keyboard.press("Escape")
    expect(chat.page.locator("#voices-dialog")).to_be_hidden()
    expect(chat.page.locator("#voices")).to_be_focused()
    chat.page.locator("#text").focus()
    keyboard.type("Where does a lion live?")
    keyboard.press("Shift+Enter")
    assert chat.page.input_value("#text") == "Where does a lion live?\n"
    keyboard.press("Enter")
    chat.until(lambda: chat.get("samplesPlayed") > 0)
    keyboard.press("Escape")
    chat.until(lambda: chat.get("interruptions") == 1)
    chat.page.locator("#talk").focus()
    keyboard.down(" ")
    chat.page.wait_for_timeout(2400)
    keyboard.up(" ")
    chat.answered(2)
    chat.page.locator("#call").focus()
    keyboard.press("Enter")
    expect(chat.page.locator("#hang-up")).to_be_focused()
    keyboard.press("Escape")
    expect(chat.page.locator("#phone")).to_be_hidden()


def test_every_control_has_a_name(visit):
    chat = visit().online()
    unnamed = chat.page.evaluate(
        """() => {
            const named = (element) =>
                element.getAttribute("aria-label") || element.textContent.trim() || element.alt ||
                element.labels?.[0]?.textContent.trim() || element.getAttribute("aria-labelledby");
            const all = document.querySelectorAll("button, select, input:not([type=file]), textarea, dialog, img");
            return [...all].filter((element) => !named(element)).map((element) => element.outerHTML);
        }"""
    )
    assert unnamed == []


def test_chinese(visit):
    chat = visit(locale="zh-CN").online()
    assert chat.page.get_attribute("html", "lang") == "zh-CN"
    assert chat.page.locator("#connection").inner_text() == "已连接"
    chat.page.click("#language")
    assert chat.page.get_attribute("html", "lang") == "en"
    chat.page.reload()
    chat.online()
    assert chat.page.locator("#connection").inner_text() == "Connected"


def test_both_languages_say_the_same():
    texts = (PAGE / "texts.js").read_text(encoding="utf-8")
    english, chinese = texts.split("  en: {")[1].split("  zh: {")
    names = [re.findall(r"^    (\w+):", part, flags=re.MULTILINE) for part in (english, chinese)]
    assert names[0] == names[1]
    used = (PAGE / "index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'data-t(?:-\w+)?="(\w+)"', used)) <= set(names[0])


def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup():
    for path in PAGE.iterdir():
        source = path.read_text(encoding="utf-8")
        assert not re.findall(r"https?://(?!www\.w3\.org/)", source), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", source), path
    markup = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", markup)
