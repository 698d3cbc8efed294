"""Headless Chromium for the tests of the page. They are skipped where there is no browser."""

import os
import shutil
from contextlib import contextmanager

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium():
    """Start a browser, and stop it at the end."""
    driver = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    rootless = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to run as root in its sandbox
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=rootless)
        yield browser
        browser.close()


@contextmanager
def opened(browser, path, **options):
    """Open a page from the file system. Any error, message of the console, dialog or request fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    page, trouble = context.new_page(), []
    page.set_default_timeout(180_000)  # a machine may be busy with other work
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("console", lambda message: message.type == "error" and trouble.append(f"console: {message.text}"))
    page.on("dialog", lambda dialog: trouble.append(f"dialog: {dialog.message}") or dialog.dismiss())
    page.on(
        "request", lambda request: request.url.startswith(("data:", "blob:", "file:")) or trouble.append(request.url)
    )
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    page.wait_for_function("window.Plotly")
    yield page
    assert trouble == []
    context.close()
