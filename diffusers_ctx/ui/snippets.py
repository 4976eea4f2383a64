"""The Python that makes what the page shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from ..embedded import embedded_call, embedded_or_given
from .settings import Settings
from .studio import STRENGTHS, Studio


def images_code(studio: Studio, settings: Settings) -> str:
    """The image, and its observational twin."""
    interventions = f"interventions={_text(settings.interventions)}, " if settings.interventions else ""
    noise = f"generator=torch.Generator().manual_seed({settings.seed})"
    return f"""import torch

{_pipeline(studio)}
prompt = {_text(settings.prompt)}
options = {_text(settings.sampling)}
image = pipe(prompt, {interventions}{noise}, **options).images[0]
twin = pipe(prompt, {noise}, **options).images[0]
image.save("image.png"), twin.save("twin.png")
"""


def pairs_code(studio: Studio, settings: Settings) -> str:
    """The grid of all pairs."""
    return f"""import torch

{_pipeline(studio, "plot")}
options = {_text(settings.sampling)}
rows = []
for index, concept in enumerate(pipe.concepts):
    pairs = [{{concept: 1.0, other: 1.0}} for other in pipe.concepts[: index + 1]]
    noise = torch.Generator().manual_seed({settings.seed})
    rows.append(pipe.sweep({_text(settings.prompt)}, pairs, generator=noise, **options).images)
plot.image_grid(rows, pipe.concepts, pipe.concepts, size={studio.inches}).savefig("pairs.png")
"""


def strip_code(studio: Studio, settings: Settings, concept: str) -> str:
    """The strip over one concept."""
    strengths = {name: _text(strength) for name, strength in settings.interventions.items()} | {concept: "strength"}
    return f"""import torch

{_pipeline(studio, "plot")}
options = {_text(settings.sampling)}
noise = torch.Generator().manual_seed({settings.seed})
strengths = {list(STRENGTHS)}
contexts = [{_mapping(strengths)} for strength in strengths]
images = pipe.sweep({_text(settings.prompt)}, contexts, generator=noise, **options).images
plot.strength_strip(images, strengths, {_text(concept)}, size={studio.inches}).savefig("strip.png")
"""


def counterfactual_code(
    studio: Studio, settings: Settings, factual: Sequence[str], transplanted: Sequence[str] = ()
) -> str:
    """The counterfactual of `picture.png`, with concepts of `second.png`."""
    second = f'\nsecond = square_crop(Image.open("second.png"), {studio.resolution})' if transplanted else ""
    interventions = {name: _text(strength) for name, strength in settings.interventions.items()}
    precision = "" if _is_as_loaded(studio) else "import torch\n"
    return f"""{precision}from PIL import Image

{_pipeline(studio, "plot", more="from diffusers_ctx.data.decoding import square_crop")}
picture = square_crop(Image.open("picture.png"), {studio.resolution}){second}
what_if = pipe.counterfactual(
    picture,
    {_mapping(interventions | dict.fromkeys(transplanted, "second"))},
    factual_interventions={_text(list(factual))},
    prompt={_text(settings.prompt)},
    num_inference_steps={settings.num_inference_steps},
).images
plot.counterfactuals([picture], what_if, size={studio.inches}).savefig("counterfactual.png")
"""


def _pipeline(studio: Studio, *names: str, more: str = "") -> str:
    """Imports from the library, and the pipeline with its adapter."""
    adapter, base = _text(studio.adapter), embedded_call(studio.base)
    imported = {studio.pipeline_class, *names}
    if embedded_or_given(studio.adapter) != studio.adapter:
        adapter = f"embedded_adapter({adapter})"
        imported.add("embedded_adapter")
    if base:
        imported.add("embedded_base")
    else:
        checker = ", safety_checker=None" if studio.pipeline_class == "ComposablePipeline" else ""
        base = f"{_text(studio.base)}, context_adapter=False{checker}"
    lines = [f"from diffusers_ctx import {', '.join(sorted(imported))}"]
    lines += [more] if more else []
    lines += ["", f"pipe = {studio.pipeline_class}.from_pretrained({base})", f"pipe.load_context_adapter({adapter})"]
    lines += [] if _is_as_loaded(studio) else [f'pipe.to("{studio.device}", {studio.dtype})']
    return "\n".join(lines)


def _is_as_loaded(studio: Studio) -> bool:
    """Whether the models are where they are loaded, and in that precision."""
    return studio.device == "cpu" and studio.dtype == torch.float32


def _mapping(entries: dict[str, str]) -> str:
    """A dictionary, of names to Python."""
    return f"{{{', '.join(f'{_text(name)}: {code}' for name, code in entries.items())}}}"


def _text(value: Any) -> str:
    """Texts, numbers, lists and dictionaries of these as Python."""
    return json.dumps(value, ensure_ascii=False)
