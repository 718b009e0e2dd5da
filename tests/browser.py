"""A headless Chromium, and what it says of a page."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium: apt-get install chromium-driver")

SECONDS = 60
# Without motion: a place that is looked up while the page scrolls is another one when it is clicked.
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--force-prefers-reduced-motion")
DESKTOP, PHONE = (1440, 900), (390, 844)

IDLE = "return window.Bokeh?.documents.length > 0 && Bokeh.documents.every((each) => each.is_idle)"

Browser = webdriver.Chrome


@contextmanager
def browse(size: tuple[int, int]) -> Iterator[Browser]:
    """A browser whose window has that size; a narrow one is a phone."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    width, height = size
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    if size == PHONE:
        metrics = {"width": width, "height": height, "pixelRatio": 1, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield browser
    finally:
        browser.quit()


def wait(browser: Browser, condition: Callable[[], Any]) -> None:
    """Wait until something is so."""
    WebDriverWait(browser, SECONDS, poll_frequency=0.05).until(lambda _: condition())


def open_page(browser: Browser, url: str) -> None:
    """Open a page, and wait until its charts are drawn."""
    browser.get(url)
    wait(browser, lambda: browser.execute_script(IDLE))


def asked(browser: Browser) -> set[str]:
    """What was requested since the last call, but for what the page itself holds."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"}
    return {url for url in urls if not url.startswith(("data:", "blob:"))}


def complaints(browser: Browser) -> list[dict[str, Any]]:
    """Errors and warnings of the console since the last call."""
    return [entry for entry in browser.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}]
