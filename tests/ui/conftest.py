"""A page that is open, and browsers to look at it."""

import shutil
import socket
import time
import urllib.request

import pytest
from forked import ForkedProgram


pytest.importorskip("gradio", reason="the page needs the extra `ui`")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 120


@pytest.fixture(scope="session")
def address():
    """Of a page that `diffusers-ctx ui` shows."""
    from diffusers_ctx.commands import main

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = ForkedProgram(main, ["ui", "--port", str(port)])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(10 * SECONDS):
            try:
                urllib.request.urlopen(address)
                break
            except OSError:
                assert program.poll() is None, program.communicate()
                time.sleep(0.1)
        yield address
    finally:
        program.terminate()
        program.wait()


@pytest.fixture(scope="session")
def browser():
    """Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="browsers are driven by playwright")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
