"""The page as people use it, in a real Chromium: every control, errors, two visitors at once.

`UI_PICTURE=docs/ui.png pytest tests/ui/test_in_browser.py` draws the picture in the docs anew.
"""

import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from diffusers_ctx.data import quad


SECONDS = 120  # at most, also on a machine that has much to do
LOADED = "() => [...document.querySelectorAll('.enlarged img')].filter((image) => image.naturalWidth).length == 2"


class Visitor:
    """Someone who looks at the page."""

    def __init__(self, browser, address, width=1280, height=900):
        self.context = browser.new_context(viewport={"width": width, "height": height}, permissions=["clipboard-read"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.hosts: set[str] = set()
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_function(LOADED)

    def image(self, label: str) -> np.ndarray:
        """Pixels of a picture, by the beginning of its description."""
        source = self.page.locator(f"img[alt^='{label}']").last.get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(self.page.request.get(source).body())).convert("RGB")).astype(int)

    def says(self, text: str) -> None:
        """Waits until the status line says so."""
        self.page.locator(".status[role=status]", has_text=re.compile(re.escape(text))).wait_for()

    def press(self, button: str) -> None:
        self.page.get_by_role("button", name=button, exact=True).click()

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()

    def slide(self, concept: str, key: str) -> None:
        """Moves a slider by keyboard."""
        self.page.get_by_role("slider", name=f"range slider for {concept}").press(key)

    def fill(self, label: str, text: str) -> None:
        field = self.page.get_by_label(label, exact=True)
        field.fill(text)
        field.press("Enter")

    def take_steps(self, number: int) -> None:
        """Sets the number of steps, which draws anew."""
        steps = self.page.get_by_label("number input for Steps")
        if not steps.is_visible():
            self.press("Sampling ▼")
        steps.fill(str(number))
        steps.press("Tab")

    def drawn(self, button: str, figure: str) -> np.ndarray:
        """Presses a tab's button and waits for its figure, which is another than before."""
        images = self.page.locator(f"img[alt^='{figure}']")
        before = images.get_attribute("src") if images.count() else None
        self.press(button)
        self.page.wait_for_function(
            "([alt, old]) => ![null, undefined, old].includes(document.querySelector(`img[alt^='${alt}']`)?.src)",
            arg=[figure, before],
        )
        return self.image(figure)

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def visit(browser, address):
    visitors = []

    def visit(**options) -> Visitor:
        visitors.append(Visitor(browser, address, **options))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        assert visitor.hosts == {address.split("/")[2]}, "the page asks other servers"
        assert visitor.faults == []
        visitor.close()


def png(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return {"name": "picture.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def test_sliders_move_the_image_and_not_its_twin(visit):
    visitor = visit()
    prompt = "a picture of a square"
    before, twin = visitor.image(f"{prompt}, do(quad1)"), visitor.image(f"{prompt}, observational")
    assert before.shape == twin.shape == (64, 64, 3) and np.abs(before - twin).max() > 50
    visitor.slide("quad4", "End")
    visitor.says("do(quad1, quad4), seed 0")
    after = visitor.image(f"{prompt}, do(quad1, quad4)")
    assert np.abs(after - before).max() > 50
    np.testing.assert_array_equal(visitor.image(f"{prompt}, observational"), twin)
    visitor.slide("quad1", "ArrowLeft")
    visitor.says("do(quad1=0.95, quad4)")
    visitor.press("Clear")
    visitor.says("observational, seed 0")
    np.testing.assert_array_equal(visitor.image(f"{prompt}, observational"), twin)


def test_noise_is_drawn_anew_where_it_is_not_locked(visit):
    visitor = visit()
    seed = visitor.page.get_by_label("Seed", exact=True)
    visitor.fill("Seed", "7")
    visitor.says("seed 7")
    visitor.fill("Prompt", "a picture of a circle")
    visitor.page.locator("img[alt='a picture of a circle, do(quad1), seed 7']").wait_for()
    assert seed.input_value() == "7"
    visitor.page.get_by_label("Lock the noise").uncheck()
    visitor.press("Draw")
    visitor.page.wait_for_function(
        "() => !document.querySelector('.status[role=status]').innerText.includes('seed 7,')"
    )
    assert seed.input_value() != "7"
    visitor.says(f"seed {seed.input_value()},")


def test_a_click_on_a_concept_intervenes_and_lights_up_what_it_causes(visit):
    visitor = visit()
    visitor.press("do(quad1)")  # which the page opens with
    visitor.says("observational")
    visitor.page.get_by_text("No interventions.").wait_for()
    visitor.press("do(quad4)")
    visitor.says("do(quad4)")
    visitor.page.get_by_text("do(quad4) changes quad1, quad2, quad3, size.").wait_for()
    graph = visitor.page.locator("img[alt^='The learned graph']")
    box = graph.bounding_box()
    scale = box["width"] / graph.evaluate("image => image.naturalWidth")
    from diffusers_ctx.ui.studio import Studio

    x, y = Studio("quad")._places["orientation"]
    graph.click(position={"x": x * scale, "y": y * scale})
    visitor.says("do(quad4, orientation)")
    graph.click(position={"x": 2, "y": 2})  # where there is nothing
    visitor.press("do(orientation)")
    visitor.says("do(quad4), ")


def test_the_python_and_the_download_have_the_settings(visit):
    visitor = visit()
    visitor.slide("size", "End")
    visitor.says("do(quad1, size)")
    visitor.press("Python that makes both ▼")
    code = visitor.page.locator(".cm-content").first
    code.get_by_text("manual_seed(0)").first.wait_for()
    assert 'interventions={"quad1": 1.0, "size": 1.0}' in code.inner_text()
    with visitor.page.expect_download() as download:
        visitor.press("Download the image with its settings")
    assert download.value.suggested_filename == "quad1+size-0.png"
    image = Image.open(download.value.path())
    np.testing.assert_array_equal(np.asarray(image), visitor.image("a picture of a square, do(quad1, size)"))
    settings = json.loads(image.info["diffusers_ctx"])
    assert settings["interventions"] == {"quad1": 1.0, "size": 1.0} and settings["adapter"] == "quad"


def test_pairs_strips_counterfactuals_and_transplants(visit):
    visitor = visit()
    visitor.take_steps(2)
    visitor.says("2 steps")
    visitor.open("Strip")
    strip = visitor.drawn("Draw the strip", "Strip")
    assert strip.shape[1] > 3 * strip.shape[0]
    visitor.open("All pairs")
    pairs = visitor.drawn("Draw all pairs", "Grid")
    assert pairs.shape[0] > 4 * strip.shape[0]
    visitor.open("Counterfactual")
    visitor.press("Draw the counterfactual")
    visitor.page.get_by_text("Upload a picture first").wait_for()
    first, second = quad.generate(n=2, seed=quad.FIRST_HELD_OUT_SEED).images
    files = visitor.page.locator("input[type=file]")
    files.first.set_input_files(png(first))
    plain = visitor.drawn("Draw the counterfactual", "The picture")
    visitor.page.get_by_role("checkbox", name="quad4").last.check()
    visitor.press("Draw the counterfactual")
    visitor.page.get_by_text("Upload a second picture, from which to take quad4").wait_for()
    files.last.set_input_files(png(second))
    transplanted = visitor.drawn("Draw the counterfactual", "The picture")
    assert np.abs(transplanted - plain).max() > 50
    visitor.press("Use the image shown above")
    visitor.page.get_by_role("checkbox", name="quad4").last.uncheck()
    assert visitor.page.get_by_role("checkbox", name="quad1").first.is_checked()
    assert np.abs(visitor.drawn("Draw the counterfactual", "The picture") - plain).max() > 50


def test_errors_are_in_words_and_leave_the_page_as_it_is(visit, tmp_path):
    visitor = visit()
    visitor.press("Choose another adapter ▼")
    visitor.page.get_by_label("Adapter", exact=True).fill(str(tmp_path))
    visitor.press("Load")
    visitor.page.get_by_text("context_adapter_config.json").wait_for()
    visitor.slide("quad2", "End")
    visitor.says("do(quad1, quad2)")


def test_visitors_do_not_cross(visit):
    one, other = visit(), visit()
    one.fill("Seed", "3")
    other.slide("quad2", "End")
    one.slide("size", "End")
    one.says("do(quad1, size), seed 3")
    other.says("do(quad1, quad2), seed 0")
    assert one.page.get_by_label("number input for quad2").input_value() == "0"
    assert other.page.get_by_label("Seed", exact=True).input_value() == "0"
    one.image("a picture of a square, do(quad1, size), seed 3")
    other.image("a picture of a square, do(quad1, quad2), seed 0")


def test_a_phone_shows_all_of_it(visit):
    visitor = visit(width=360, height=740)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 360
    visitor.slide("quad2", "End")
    visitor.says("do(quad1, quad2)")


def test_the_picture_in_the_docs(visit):
    visitor = visit(width=1100, height=1250)
    visitor.press("do(quad1)")
    visitor.says("observational")
    visitor.press("do(quad3)")
    visitor.says("do(quad3)")
    visitor.page.get_by_text("do(quad3) changes quad1, quad2, size.").wait_for()
    assert visitor.page.locator("img[alt$='do(quad3), seed 0']").bounding_box()["width"] > 200
    visitor.page.mouse.move(1, 1)
    visitor.page.wait_for_timeout(1000)  # animations of the page
    picture = Image.open(io.BytesIO(visitor.page.screenshot(full_page=True))).convert("RGB")
    assert picture.width == 1100
    if file := os.environ.get("UI_PICTURE"):
        picture.quantize(128).save(file, optimize=True)
