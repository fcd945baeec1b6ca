"""A real browser on the report's pages."""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
         "microsoft-edge")
PLACES = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)
SERIOUS = ("serious", "critical")


def browser_here() -> str | None:
    """A Chromium on this machine: STUDY_BROWSER, or the first of the usual names."""
    found = [os.environ.get("STUDY_BROWSER"), *map(shutil.which, NAMES)]
    return next(filter(None, found), next(filter(os.path.exists, PLACES), None))


@contextmanager
def browsing(width: int, dark: bool = False) -> Iterator[Page]:
    """A page of this width in pixels; without a browser the test is skipped, and pytest says so."""
    if browser_here() is None:
        pytest.skip("NOT TESTED: the report in a browser, since no Chromium or Chrome is here; "
                    "install one, or name it in STUDY_BROWSER")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_here(), args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": width, "height": 900},
                               color_scheme="dark" if dark else "light")
        browser.close()


def complaints(page: Page, path: Path, folder: Path) -> list[str]:
    """What the browser says against a page: errors, requests that leave the folder or find nothing,
    pictures that do not show, more than its width.
    """
    said = []

    def requested(request) -> None:
        address = urlsplit(request.url)
        inside = address.scheme == "file" and Path(unquote(address.path)).is_relative_to(folder)
        if not inside and address.scheme != "data":
            said.append(f"leaves the folder: {request.url}")

    def printed(message) -> None:
        if message.type in ("error", "warning"):
            said.append(f"console: {message.text}")

    listeners = {"console": printed, "pageerror": lambda error: said.append(f"error: {error}"),
                 "request": requested,
                 "requestfailed": lambda request: said.append(f"not found: {request.url}")}
    for event, listener in listeners.items():
        page.on(event, listener)
    page.goto(path.as_uri(), wait_until="load")
    said += page.evaluate("""() => [...document.images].filter(i => i.complete && !i.naturalWidth)
                             .map(i => `no picture: ${i.src}`)""")
    too_wide = page.evaluate(
        "() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if too_wide > 0:
        said.append(f"{too_wide} pixels too wide")
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    return said


def dead_links(page: Page, folder: Path) -> list[str]:
    """Links of the page that is open which lead to no file of the folder, or to no place in it."""
    dead = []
    for link in page.evaluate("() => [...document.links].map(link => link.href)"):
        address = urlsplit(link)
        if address.scheme in ("http", "https", "mailto"):
            continue
        path = Path(unquote(address.path))
        if not path.is_relative_to(folder) or not path.is_file():
            dead.append(link)
        elif address.fragment and path.suffix == ".html":
            place = unquote(address.fragment)
            text = path.read_text(encoding="utf-8")
            dead += [link] if f'id="{place}"' not in text and place else []
    return dead


def barriers(page: Page) -> list[str]:
    """What axe-core finds serious on the page that is open."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found
            if each["impact"] in SERIOUS]
