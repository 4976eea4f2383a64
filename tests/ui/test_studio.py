"""What the page computes: pictures, the Python that makes them, and who may choose what."""

import asyncio
import json
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_ctx import ComposablePipeline, ContextModule, embedded_adapter, embedded_base
from diffusers_ctx.adapter import attach_context_module
from diffusers_ctx.data import quad


pytest.importorskip("gradio", reason="the page needs the extra `ui`")

import gradio

from diffusers_ctx.ui.session import Session, Stopped
from diffusers_ctx.ui.settings import Settings
from diffusers_ctx.ui.snippets import counterfactual_code, images_code, pairs_code, strip_code
from diffusers_ctx.ui.studio import Studio
from diffusers_ctx.ui.studios import Studios
from diffusers_ctx.ui.workplace import lay_out


SETTINGS = Settings('a "picture"\nof a square', {"quad1": 1.0, "size": 0.5}, 3, 2, 1.0)
SPACE = Path(__file__).parents[2] / "examples" / "space"


def ignore(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio("quad")


@pytest.fixture
def session(studio) -> Session:
    return Session(studio)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs Python in a folder of its own, and reads the PNG that it writes there."""
    monkeypatch.chdir(tmp_path)

    def run(code: str, file: str) -> np.ndarray:
        exec(compile(code, "snippet", "exec"), {})
        return np.asarray(Image.open(file))

    return run


@pytest.mark.parametrize("interventions", [{"quad1": 1.0, "size": 0.5}, {}])
def test_the_python_makes_the_image_and_its_twin(session, run, interventions):
    settings = SETTINGS.under(interventions)
    shown = session.draw(settings, ignore)
    code = images_code(session.studio, settings)
    np.testing.assert_array_equal(run(code, "image.png"), np.asarray(Image.open(shown.image)))
    np.testing.assert_array_equal(run(code, "twin.png"), np.asarray(Image.open(shown.twin)))


def test_the_python_makes_the_strip(studio, run):
    strip = np.asarray(studio.strip(SETTINGS, "size", ignore))
    np.testing.assert_array_equal(run(strip_code(studio, SETTINGS, "size"), "strip.png"), strip)


def test_the_python_makes_the_pairs(studio, run):
    settings = replace(SETTINGS, num_inference_steps=1)
    pairs = np.asarray(studio.pairs(settings, ignore))
    np.testing.assert_array_equal(run(pairs_code(studio, settings), "pairs.png"), pairs)


@pytest.mark.parametrize("transplanted", [[], ["quad4"]])
def test_the_python_makes_the_counterfactual(studio, run, transplanted):
    picture, second = map(Image.fromarray, quad.generate(n=2, seed=quad.FIRST_HELD_OUT_SEED).images)
    second = second.resize((100, 70))  # pictures may have any size
    picture.save("picture.png"), second.save("second.png")
    made = studio.counterfactual(picture, SETTINGS, ["quad2"], ignore, second if transplanted else None, transplanted)
    code = counterfactual_code(studio, SETTINGS, ["quad2"], transplanted)
    np.testing.assert_array_equal(run(code, "counterfactual.png"), np.asarray(made))


def test_the_python_of_other_models_names_them(studio, monkeypatch):
    monkeypatch.setattr(studio, "adapter", "someone/weather")
    monkeypatch.setattr(studio, "base", "someone/base")
    monkeypatch.setattr(studio, "device", "cuda")
    code = images_code(studio, SETTINGS)
    assert 'from_pretrained("someone/base", context_adapter=False, safety_checker=None)\n' in code
    assert 'load_context_adapter("someone/weather")\npipe.to("cuda", torch.float32)\n' in code
    assert "embedded" not in code
    assert code.count("import torch\n") == counterfactual_code(studio, SETTINGS, []).count("import torch\n") == 1


def test_files_hold_their_settings(session):
    shown = session.draw(SETTINGS, ignore)
    held = json.loads(Image.open(shown.image).info["diffusers_ctx"])
    assert held.pop("version")
    assert held == {"adapter": "quad", "base": "embedded_base()", **asdict(SETTINGS)}
    assert json.loads(Image.open(shown.twin).info["diffusers_ctx"])["interventions"] == {}
    assert shown.image.name == "quad1+size-3.png"


def test_what_was_drawn_lately_is_not_drawn_again(session):
    told = []
    settings = SETTINGS.under({"quad2": 1.0})
    session.draw(settings, ignore)
    session.draw(settings.under({"quad3": 1.0}), lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]  # the image, and not its twin


def test_a_visitor_stops_their_own_work(studio):
    one, other, fresh = Session(studio), Session(studio), Session(Studio("quad"))
    settings = SETTINGS.under({"quad4": 0.5})
    with pytest.raises(Stopped):
        one.draw(settings, lambda done, total: one.stop())
    drawn = [
        other.draw(settings, lambda done, total: one.stop()),  # nobody stops the work of others
        one.draw(settings, ignore),  # nor their own later work
        fresh.draw(settings, ignore),  # and the pipeline is as it was
    ]
    images = [np.asarray(Image.open(shown.image)) for shown in drawn]
    np.testing.assert_array_equal(images[0], images[2])
    np.testing.assert_array_equal(images[1], images[2])


def test_the_graph_lights_what_interventions_cause(studio):
    plain, lit = (np.asarray(studio.graph(names)) for names in ((), ("quad4",)))
    assert plain.shape == lit.shape and (plain != lit).any()
    assert studio.effects(["quad4"]) == ["quad1", "quad2", "quad3", "size"]
    assert studio.effects(["quad4", "quad3"]) == ["quad1", "quad2", "size"]
    height, width = lit.shape[:2]
    found = {studio.concept_at(x, y) for x in range(0, width, 10) for y in range(0, height, 10)}
    assert found == {*studio.concepts, None}
    orange = np.argwhere(np.abs(lit[..., :3].astype(int) - [245, 166, 35]).max(axis=2) < 5)
    y, x = orange.mean(axis=0)
    assert studio.concept_at(x, y) == "quad4"


def test_visitors_who_choose_one_adapter_share_it():
    studios = Studios()
    assert studios.open("quad") is studios.open("quad")
    with pytest.raises(ValueError, match="Name an adapter"):
        studios.open("")


@pytest.mark.parametrize("name", ["/etc", "~", "../adapters", "a/../b", embedded_adapter("quad"), "weather"])
def test_a_page_for_strangers_opens_no_folders(name):
    studios = Studios(hub_only=True)
    with pytest.raises(ValueError, match="this page opens no folders"):
        studios.open(name)
    with pytest.raises(ValueError, match="this page opens no folders"):
        studios.open("quad", name)


def test_the_space_has_what_it_needs():
    page = runpy.run_path(str(SPACE / "app.py"))["page"]
    assert page.analytics_enabled is False
    import gradio

    header = (SPACE / "README.md").read_text(encoding="utf-8").split("---")[1]
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text()
    assert f"gradio=={gradio.__version__}\n" in constraints and f"sdk_version: {gradio.__version__}\n" in header
    assert "app_file: app.py\n" in header
    assert (SPACE / "requirements.txt").read_text() == "diffusers-ctx[ui]\n"


def test_a_missing_gradio_is_named_with_its_mend(monkeypatch, capsys):
    from diffusers_ctx.commands import main

    for module in [name for name in sys.modules if name.startswith("diffusers_ctx.ui")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui"]) == 1
    assert capsys.readouterr().err == "diffusers-ctx: The page needs gradio; run `pip install 'diffusers-ctx[ui]'`.\n"


def test_an_adapter_of_the_hub_opens_no_folder_as_its_base(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--weather"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(embedded_adapter("quad"), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    config = json.loads((snapshot / "context_adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "of" / "the-host")
    (snapshot / "context_adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of/the-host' is no name on the Hub, .*, and this page opens no folders"):
        Studios(hub_only=True).open("someone/weather")


def test_the_host_may_open_a_folder_for_strangers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(embedded_adapter("quad"), "mine")
    studios = Studios(hub_only=True, own=("mine", embedded_base()))
    assert studios.open("mine", embedded_base()).concepts == list(quad.CONCEPTS)
    with pytest.raises(ValueError, match="this page opens no folders"):
        studios.open("mine")
    Path("quad").mkdir()  # in the place of the adapter of that name
    with pytest.raises(ValueError, match="this page opens no folders"):
        studios.open("quad")


def test_an_adapter_with_one_concept_is_cleared(tmp_path):
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    config = ContextModule.from_pretrained(embedded_adapter("quad"), subfolder="context_module").config
    module = ContextModule.from_config({**config, "concepts": ["night"]})
    attach_context_module(pipeline.unet, module)
    pipeline.save_context_adapter(tmp_path)
    studio = Studio(str(tmp_path), embedded_base())
    assert studio.concepts == ["night"]
    with gradio.Blocks() as page:
        lay_out(Session(studio))
    (clear,) = [fn for fn in page.fns.values() if fn.fn and fn.fn.__name__ == "<lambda>"]
    with ThreadPoolExecutor() as threads:  # the browser's driver has an event loop in this one
        cleared = threads.submit(asyncio.run, page.process_api(clear, [])).result()
    assert cleared["data"] == [0.0]


def test_names_of_files_are_short_enough(studio):
    settings = SETTINGS.under({"é" * 40 + str(index): 1.0 for index in range(4)})
    name = Session(studio)._save(Image.new("RGB", (8, 8)), settings).name
    assert name.endswith("-3.png") and 80 < len(name.encode()) < 120
