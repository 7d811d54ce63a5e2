"""The site as its readers have it: opened from disk, without a network, in headless Chromium.

Skipped where what it needs is missing, unless `REQUIRE_BROWSER` is set, as it is in CI: then that is a failure.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests import watchdog

pytestmark = pytest.mark.slow  # about the documentation, and with a browser: a quarter of the time of all quick tests

ROOT = Path(__file__).resolve().parents[2]
SHOTS = os.environ.get("SCREENSHOTS")
"""A folder for pictures of all pages."""
PHONE, DESKTOP = (360, 740), (1280, 900)
FLAGS = """
    --headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-default-apps --hide-scrollbars --force-color-profile=srgb
    --host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1
"""


def unavailable(reason: str) -> None:
    (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a dead link, a missing anchor or a page that the navigation lacks is an error."""
    if importlib.util.find_spec("material") is None:
        unavailable("mkdocs-material is not installed: make .venv/.docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """What a page offers and asks for."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors = {""}
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values.get("id", ""), values.get("name", "") if tag == "a" else ""}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "alternate", "prev", "next"):
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])


read_page = cache(Page)


def test_links_lead_somewhere_on_disk(site: Path) -> None:
    """Each link within the site is relative, and its file and anchor exist; that goes for both languages."""
    faults = []
    for file in site.rglob("*.html"):
        for link in read_page(file).links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if link.startswith("/") or not target.is_file():
                faults.append(f"{file.relative_to(site)}: {link}")
            elif target.suffix == ".html" and unquote(parts.fragment) not in read_page(target).anchors:
                faults.append(f"{file.relative_to(site)}: {link}: no such anchor")
    assert not [fault for fault in faults if not fault.startswith("404.html")]


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures come from the site itself: no CDN."""
    faults = []
    for file in site.rglob("*.html"):
        faults += [
            f"{file.name}: {each}" for each in read_page(file).loaded if urlsplit(each).scheme not in ("", "data")
        ]
    for file in site.rglob("*.css"):
        faults += [
            f"{file.name}: {url}" for url in re.findall(r"url\([\"']?((?:https?:)?//[^)]*)", file.read_text("utf-8"))
        ]
    assert not faults


@pytest.fixture(scope="module")
def browser(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium; `find` and `wait` are its handiest methods."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        unavailable("no Chromium with its driver is installed (Debian: apt install chromium chromium-driver)")
    if importlib.util.find_spec("selenium") is None:
        unavailable("selenium is not installed: make .venv/.docs")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in re.split(r"\s+(?=--)", FLAGS.strip()):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(chromedriver)) as driver:
        driver.set_script_timeout(30)
        process = driver.service.process
        assert process is not None
        watchdog.lasting.add(process.pid)
        try:
            yield driver
        finally:
            watchdog.lasting.discard(process.pid)


@pytest.fixture
def visit(site: Path, browser: Any) -> Callable[..., None]:
    """`visit(page, size)` opens a page (from disk, or an address) as a first-time visitor, and waits for its diagrams."""

    def go(page: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE},
        )
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        browser.get(page if page.startswith("http:") else (site / page).as_uri())
        wait(browser, "return document.readyState === 'complete' && !document.querySelector('pre.diagram')")
        wait(browser, "return [...document.querySelectorAll('div.diagram')].every((each) => each.dataset.drawn)")

    return go


def wait(browser: Any, script: str, *arguments: Any) -> Any:
    """Waits until a script gives something that is true; gives that."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20, 0.05).until(lambda it: it.execute_script(script, *arguments), script)


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


LOOK = r"""
const width = document.documentElement.clientWidth, faults = []
const shown = (each) => each.getClientRects().length && getComputedStyle(each).visibility !== "hidden"
for (const each of document.querySelectorAll("article *")) {
  const box = each.getBoundingClientRect()
  if (!box.width || box.right <= width + 1 || !shown(each) || each.closest("svg")) continue
  let scrolls = false
  for (let up = each.parentElement; up && !scrolls; up = up.parentElement)
    scrolls = /auto|scroll/.test(getComputedStyle(up).overflowX) && up.scrollWidth > up.clientWidth
  if (!scrolls) faults.push(`cut off: ${each.outerHTML.slice(0, 80)}`)
}
for (const each of document.querySelectorAll("img"))
  if (!each.naturalWidth) faults.push(`no picture: ${each.src}`)

// Contrast, as WCAG 2 reckons it: 4.5 is its level AA for running text.
const numbers = (color) => color.match(/[\d.]+/g).map(Number)
const over = ([r, g, b, a = 1], ground) => [r, g, b].map((part, n) => part * a + ground[n] * (1 - a))
const light = (color) => color.map((part) => (part /= 255) <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
  .reduce((sum, part, n) => sum + part * [0.2126, 0.7152, 0.0722][n], 0)
const ground = (each) => !each ? [255, 255, 255]
  : over(numbers(getComputedStyle(each).backgroundColor), ground(each.parentElement))
const seen = new Set()
for (const each of document.querySelectorAll("article *, .md-nav *, .md-footer *")) {
  const words = [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
  if (!words || each.closest("svg, .headerlink") || !shown(each)) continue
  const color = numbers(getComputedStyle(each).color), behind = ground(each)
  const key = `${color} on ${behind.map(Math.round)}`
  if (seen.has(key)) continue
  seen.add(key)
  const [a, b] = [light(over(color, behind)), light(behind)].sort((x, y) => y - x)
  const contrast = (a + 0.05) / (b + 0.05)
  if (contrast < 4.5) faults.push(`contrast of ${contrast.toFixed(2)}, ${key}: ${each.textContent.trim().slice(0, 40)}`)
}
return faults
"""


@pytest.mark.parametrize(
    ("size", "scheme"),
    [(PHONE, "light"), (DESKTOP, "dark"), *([(PHONE, "dark"), (DESKTOP, "light")] if SHOTS else [])],
    ids=lambda each: each if isinstance(each, str) else f"{each[0]} wide",
)
def test_each_page(site: Path, browser: Any, visit: Any, size: tuple[int, int], scheme: str) -> None:
    """No page scrolls sideways or complains to the console, nothing in it is cut off (what is too wide scrolls in a box of its
    own), no picture is missing, its text can be told from its ground, and each diagram is a drawing with something in it.
    """
    faults, diagrams = [], 0
    for file in sorted(site.rglob("*.html")):
        page = str(file.relative_to(site))
        if page in ("404.html", "ko/404.html"):
            continue
        visit(page, size, scheme)
        wide = browser.execute_script(
            "const width = document.documentElement.clientWidth;"
            "return document.documentElement.scrollWidth <= width ? [] : [...document.querySelectorAll('article *')]"
            ".filter((each) => each.getBoundingClientRect().right > width).map((each) => each.outerHTML.slice(0, 80))"
            ".concat(`${document.documentElement.scrollWidth} > ${width}`)"
        )
        if wide:
            faults.append(f"{page} scrolls sideways: {wide[:3]}")
        faults += [f"{page}: {each}" for each in browser.execute_script(LOOK)]
        drawn = browser.execute_script(
            "return [...document.querySelectorAll('div.diagram')].map((each) => {"
            "  const box = each.querySelector('svg')?.getBoundingClientRect();"
            "  return box && box.width > 100 && box.height > 50 && each.querySelectorAll('text, foreignObject').length"
            "    && !each.textContent.includes('Syntax error') })"
        )
        diagrams += len(drawn)
        if not all(drawn):
            faults.append(f"{page}: a diagram is not drawn: {drawn}")
        faults += [f"{page}: {each}" for each in complaints(browser)]
        if SHOTS:
            save(browser, Path(SHOTS), f"{page.replace('/', '-')}-{size[0]}-{scheme}")
    assert not faults
    assert diagrams


def save(browser: Any, folder: Path, name: str) -> None:
    """Keeps pictures of the whole page, from top to bottom, for people to look at (SCREENSHOTS=folder)."""
    import base64

    folder.mkdir(parents=True, exist_ok=True)
    size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    for part, top in enumerate(range(0, size["height"], 7000)):
        clip = {"x": 0, "y": top, "width": size["width"], "height": min(size["height"] - top, 7000), "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        (folder / f"{name}-{part}.png").write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def served(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The site over HTTP, below a path, as many a server has it: gives its address."""
    root = tmp_path_factory.mktemp("www")
    (root / "some" / "where").mkdir(parents=True)
    (root / "some" / "where" / "docs").symlink_to(site)

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(root))

        def send_error(self, code: int, *_: Any, **__: Any) -> None:
            body = (site / "404.html").read_bytes()
            self.send_response(code)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/some/where/docs/"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("over", ["disk", "HTTP"])
@pytest.mark.parametrize(
    ("start", "word", "found"),
    [
        ("index.html", "rollback", "rollback"),
        ("index.html", "long_read_s", "long_read_s"),
        ("index.html", "migration", "migration"),
        ("ko/index.html", "롤백", "롤백"),
        ("ko/guides/pool.html", "long_read_s", "long_read_s"),
    ],
)
def test_search(
    browser: Any, visit: Any, request: pytest.FixtureRequest, over: str, start: str, word: str, found: str
) -> None:
    """The search finds words and identifiers, in pages of the reader's language only, and no source of a diagram."""
    from selenium.webdriver.common.by import By

    visit(start if over == "disk" else request.getfixturevalue("served") + start)
    browser.find_element(By.CSS_SELECTOR, "label.md-search__icon, .md-search__input").click()
    browser.find_element(By.CSS_SELECTOR, ".md-search__input").send_keys(word)
    links = wait(
        browser,
        "const links = [...document.querySelectorAll('.md-search-result__item a.md-search-result__link')];"
        "return links.length && links.map((link) => link.href)",
    )
    korean = start.startswith("ko/")
    assert all(("/ko/" in link) is korean for link in links), links
    assert "sequenceDiagram" not in browser.find_element(By.CSS_SELECTOR, ".md-search-result").text
    browser.get(links[0])
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == ("ko" if korean else "en")
    assert found in browser.find_element(By.TAG_NAME, "article").text.lower()
    assert not complaints(browser)


def test_search_by_parts(site: Path) -> None:
    """Who remembers a part of an identifier finds it; each language's index has its own pages, all of them."""
    for folder, pages in (("", site), ("ko/", site / "ko")):
        script = (site / folder / "search/search_index.js").read_text("utf-8")
        index = json.loads(script.removeprefix("var __index = "))
        assert index == json.loads((site / folder / "search/search_index.json").read_text("utf-8"))
        places = {entry["location"].partition("#")[0] for entry in index["docs"]}
        files = {str(file.relative_to(pages)) for file in pages.rglob("*.html")}
        assert places == {file for file in files if not file.startswith("ko/")} - {"404.html"}
        [keys] = [entry for entry in index["docs"] if entry["location"] == "guides/configuration.html#the-pool"] or [{}]
        assert "timeout" in keys.get("parts", "").split()
        assert not [entry["location"] for entry in index["docs"] if "accTitle" in entry["text"]]


def test_no_such_page(served: str, browser: Any) -> None:
    """An address that does not exist leads to the start page, however deep it is and wherever the site lies."""
    from selenium.webdriver.common.by import By

    for address in ("nothing.html", "guides/nothing/at/all.html"):
        browser.get(served + address)
        wait(browser, "return document.querySelector('a[data-start]').href.includes('/some/where/')")
        links = [each.get_attribute("href") for each in browser.find_elements(By.CSS_SELECTOR, "a[data-start]")]
        assert links == [f"{served}index.html", f"{served}ko/index.html"]
        assert browser.find_element(By.TAG_NAME, "h1").text == "There is no such page"
    browser.get_log("browser")  # it says that the address does not exist


def test_language_switch(browser: Any, visit: Any) -> None:
    """The switch leads to the same page in the other language, and back."""
    from selenium.webdriver.common.by import By

    visit("guides/transactions.html")
    for language, path in (("ko", "/ko/guides/transactions.html"), ("en", "/guides/transactions.html")):
        link = browser.find_element(By.CSS_SELECTOR, f".md-select a[hreflang={language}]")
        browser.execute_script("arguments[0].closest('.md-select').querySelector('button').focus()", link)
        wait(browser, "return getComputedStyle(arguments[0].closest('.md-select__inner')).opacity === '1'", link)
        link.click()
        wait(browser, "return document.documentElement.lang === arguments[0]", language)
        wait(browser, "return document.readyState === 'complete'")
        assert urlsplit(browser.current_url).path.endswith(path)
        assert ("트랜잭션" in browser.find_element(By.TAG_NAME, "h1").text) is (language == "ko")
    assert not complaints(browser)


def test_diagrams_follow_the_scheme(browser: Any, visit: Any) -> None:
    """A diagram is drawn anew, in other colours, when the reader switches between light and dark."""
    visit("guides/how-it-works.html")
    before = browser.execute_script("return document.querySelector('div.diagram').innerHTML")
    browser.execute_script("document.querySelector('label[for=__palette_1]').click()")
    browser.execute_script("document.querySelector('label[for=__palette_2]').click()")
    wait(browser, "return document.body.dataset.mdColorScheme === 'slate'")
    wait(browser, "return document.querySelector('div.diagram').innerHTML !== arguments[0]", before)
    assert not complaints(browser)
