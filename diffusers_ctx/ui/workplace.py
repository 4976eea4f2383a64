"""What belongs to one adapter: its controls, an image beside its twin, and tabs."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr

from .controls import Controls
from .events import PRIVATE, QUEUED, in_words, on_step
from .session import Session, Shown, Stopped
from .settings import Settings
from .snippets import images_code
from .tabs import BUTTONS, add_counterfactuals, add_pairs, add_strip


def lay_out(session: Session) -> None:
    """Lays out all that a visitor needs to work with an adapter, and draws the first image."""
    studio = session.studio
    settings = studio.defaults()
    shown = session.draw_first()
    gr.Markdown(f"Adapter **{studio.adapter}** on {studio.models['base']}")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            controls = Controls(studio)
        with gr.Column(scale=3, min_width=300):
            pictures = _Pictures(session, settings, shown)
    with gr.Tabs():
        with gr.Tab("Causes"):
            causes = _Causes(session, controls, settings)
        work = [add_pairs(session, controls), add_strip(session, controls)]
        work.append(add_counterfactuals(session, controls, pictures.image))

    def draw(values: dict[Any, Any], progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        with in_words():
            try:
                settings = controls.settings(values)
                shown = session.draw(settings, on_step(progress))
            except Stopped:
                return gr.skip()
        return [settings.seed, *pictures.updates(settings, shown), *causes.updates(settings)]

    drawing = {
        "fn": draw,
        "inputs": controls.inputs,
        "outputs": [controls.seed, *pictures.outputs, *causes.outputs],
        "trigger_mode": "always_last",
        "show_progress_on": pictures.status,
        **QUEUED,
    }
    sliders = list(controls.sliders.values())
    moved = [slider.input for slider in (*sliders, controls.steps, controls.guidance)]
    events = [gr.on([*moved, controls.draw.click, controls.prompt.submit, controls.seed.submit], **drawing)]
    events += [event.then(**drawing) for event in causes.clicks]
    cleared = controls.reset.click(lambda: dict.fromkeys(sliders, 0.0), None, sliders, **PRIVATE)
    events.append(cleared.then(**drawing))
    controls.stop.click(session.stop, cancels=[*events, *work], queue=False, **PRIVATE)


class _Pictures:
    """An image beside its observational twin, and how it was made."""

    def __init__(self, session: Session, settings: Settings, shown: Shown) -> None:
        self._studio = session.studio
        alike: dict[str, Any] = {
            "type": "pil",
            "format": "png",
            "interactive": False,
            "min_width": 140,
            "elem_classes": ["enlarged", *["small-pixels"] * self._studio.is_small],
            "buttons": BUTTONS,
        }
        with gr.Row():
            self.image = gr.Image(str(shown.image), label="Image", alt_text=_described(settings), **alike)
            self.twin = gr.Image(
                str(shown.twin), label="Observational twin", alt_text=_described(settings.under({})), **alike
            )
        self.status = gr.HTML(
            _said(settings), elem_classes="status", js_on_load="element.setAttribute('role', 'status')"
        )
        self.download = gr.DownloadButton("Download the image with its settings", shown.image, size="md")
        with gr.Accordion("Python that makes both", open=False):
            self.code = gr.Code(
                images_code(self._studio, settings), language="python", interactive=False, label="Python"
            )
        self.outputs = [self.image, self.twin, self.status, self.download, self.code]

    def updates(self, settings: Settings, shown: Shown) -> list[Any]:
        """What the outputs show of new pictures."""
        return [
            gr.Image(str(shown.image), alt_text=_described(settings)),
            gr.Image(str(shown.twin), alt_text=_described(settings.under({}))),
            _said(settings),
            shown.image,
            images_code(self._studio, settings),
        ]


class _Causes:
    """The learned graph: a click on a concept intervenes on it, and what it causes lights up."""

    def __init__(self, session: Session, controls: Controls, settings: Settings) -> None:
        self._studio = studio = session.studio
        sliders = list(controls.sliders.values())
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                intervened = tuple(settings.interventions)
                self.graph = gr.Image(
                    studio.graph(intervened),
                    label="Learned graph",
                    format="png",
                    interactive=False,
                    buttons=BUTTONS,
                    alt_text="The learned graph of the concepts, with an arrow from each cause to its effect",
                )
            with gr.Column(scale=2, min_width=300):
                gr.Markdown(
                    "Intervene on a concept: click on it in the graph, or here. Orange concepts are intervened on, and"
                    " light ones change because of them. Dotted edges are cut."
                )
                with gr.Row():
                    buttons = [gr.Button(f"do({name})", min_width=140, size="md") for name in studio.concepts]
                self.effects = gr.Markdown(self._effects(intervened))
        self.outputs = [self.graph, self.effects]

        def toggle(event: gr.SelectData, *strengths: float) -> Any:
            clicked = studio.concept_at(*event.index)
            if clicked is None:
                return gr.skip()
            # by its slider: of a list with one value, gradio takes the list for the value of a single slider
            return {controls.sliders[clicked]: _other(strengths[studio.concepts.index(clicked)])}

        self.clicks = [self.graph.select(toggle, sliders, sliders, **PRIVATE)]
        for button, slider in zip(buttons, sliders):
            self.clicks.append(button.click(_other, slider, slider, **PRIVATE))

    def updates(self, settings: Settings) -> list[Any]:
        """What the outputs show under new interventions."""
        intervened = tuple(settings.interventions)
        return [self._studio.graph(intervened), self._effects(intervened)]

    def _effects(self, intervened: Sequence[str]) -> str:
        if not intervened:
            return "No interventions."
        effects = ", ".join(self._studio.effects(intervened)) or "no other concept"
        return f"do({', '.join(intervened)}) changes {effects}."


def _other(strength: float) -> float:
    return 0.0 if strength else 1.0


def _described(settings: Settings) -> str:
    return f"{settings.prompt or 'Image'}, {settings.context}, seed {settings.seed}"


def _said(settings: Settings) -> str:
    return html.escape(
        f"{settings.context}, seed {settings.seed}, {settings.num_inference_steps} steps,"
        f" guidance {settings.guidance_scale:g}"
    )
