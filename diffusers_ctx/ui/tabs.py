"""Tabs with larger pictures, which are drawn when a visitor asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from PIL.Image import Image

from .controls import Controls
from .events import PRIVATE, QUEUED, in_words, on_step
from .session import Session, Stopped
from .settings import Settings
from .snippets import counterfactual_code, pairs_code, strip_code
from .studio import OnStep


BUTTONS: list[Any] = ["download", "fullscreen"]
"""Of a picture; the one to share it is left out."""

Make = Callable[[Settings, dict[Any, Any], OnStep], tuple[Image, str]]


def add_pairs(session: Session, controls: Controls) -> Any:
    """A grid of all pairs of concepts; returns the event that draws it."""
    studio = session.studio

    def make(settings: Settings, values: dict[Any, Any], progress: OnStep) -> tuple[Image, str]:
        return studio.pairs(settings, progress), pairs_code(studio, settings)

    with gr.Tab("All pairs"):
        gr.Markdown("Every pair of concepts, from the same noise. On the diagonal is each concept alone.")
        return _drawn("Draw all pairs", "Grid of all pairs of concepts", make, session, controls)


def add_strip(session: Session, controls: Controls) -> Any:
    """A strip over the strengths of one concept; returns the event that draws it."""
    studio = session.studio

    def make(settings: Settings, values: dict[Any, Any], progress: OnStep) -> tuple[Image, str]:
        name = values[concept]
        return studio.strip(settings, name, progress), strip_code(studio, settings, name)

    with gr.Tab("Strip"):
        gr.Markdown("One concept at rising strengths. The other sliders stay as they are.")
        concept = gr.Dropdown(studio.concepts, value=studio.concepts[0], label="Concept", interactive=True)
        return _drawn("Draw the strip", "Strip over one concept", make, session, controls, frozenset({concept}))


def add_counterfactuals(session: Session, controls: Controls, image: gr.Image) -> Any:
    """What a picture would have been; returns the event that draws it.

    Args:
        session: of the visitor.
        controls: whose interventions are those of the counterfactual.
        image: the one that is shown, which may be the picture.
    """
    studio = session.studio
    sliders = list(controls.sliders.values())

    def make(settings: Settings, values: dict[Any, Any], progress: OnStep) -> tuple[Image, str]:
        if values[picture] is None:
            raise ValueError("Upload a picture first, or use the image shown above.")
        taken = values[transplanted]
        if taken and values[second] is None:
            raise ValueError(f"Upload a second picture, from which to take {', '.join(taken)}.")
        drawn = studio.counterfactual(
            values[picture], settings, values[factual], progress, values[second] if taken else None, taken
        )
        return drawn, counterfactual_code(studio, settings, values[factual], taken)

    with gr.Tab("Counterfactual"):
        gr.Markdown(
            "What would a picture have been under the interventions of the sliders? It is cropped to a square of"
            f" {studio.resolution} pixels, which the adapter was trained on."
        )
        with gr.Row():
            with gr.Column(min_width=300):
                picture = _upload("Picture")
                take = gr.Button("Use the image shown above", size="md")
                factual = gr.CheckboxGroup(
                    studio.concepts,
                    label="The picture arose under",
                    info="Nothing, for an ordinary picture.",
                    interactive=True,
                )
            with gr.Column(min_width=300):
                second = _upload("Second picture, if any")
                transplanted = gr.CheckboxGroup(
                    studio.concepts,
                    label="Take from the second picture",
                    info="These concepts get the values that it shows, whatever their sliders say.",
                    interactive=True,
                )

        def use(shown: Image, *strengths: float) -> tuple[Image, list[str]]:
            return shown, [name for name, strength in zip(studio.concepts, strengths) if strength]

        take.click(use, [image, *sliders], [picture, factual], **PRIVATE)
        inputs = frozenset({picture, factual, second, transplanted})
        shows = "The picture, its counterfactual and their difference"
        return _drawn("Draw the counterfactual", shows, make, session, controls, inputs)


def _upload(label: str) -> gr.Image:
    return gr.Image(label=label, type="pil", sources=["upload", "clipboard"], height=240, interactive=True)


def _drawn(
    label: str, shows: str, make: Make, session: Session, controls: Controls, inputs: frozenset[Any] = frozenset()
) -> Any:
    """A button, the figure that it draws, and the Python for it; returns the event.

    Args:
        label: of the button.
        shows: what the figure shows, for those who do not see it.
        make: draws the figure, and writes the Python.
        session: of the visitor.
        controls: whose settings it takes.
        inputs: other components whose values it takes.
    """
    button = gr.Button(label, variant="primary")
    picture = gr.Image(
        label="Figure",
        format="png",
        interactive=False,
        show_label=False,
        alt_text=shows,
        buttons=BUTTONS,
    )
    with gr.Accordion("Python that makes it", open=False):
        code = gr.Code(language="python", interactive=False, label="Python")

    def draw(values: dict[Any, Any], progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        with in_words():
            try:
                settings = controls.settings(values)
                drawn, program = make(settings, values, session.watch(on_step(progress)))
            except Stopped:
                return gr.skip()
        return settings.seed, drawn, program

    return button.click(
        draw, controls.inputs | inputs, [controls.seed, picture, code], show_progress_on=picture, **QUEUED
    )
