"""What a visitor sets: prompt, a slider per concept, noise, sampling."""

from __future__ import annotations

import secrets
from typing import Any

import gradio as gr

from .settings import Settings
from .studio import Studio


_SEEDS = 2**31
_MOST_STEPS = 100


class Controls:
    """The controls of an adapter, laid out where this is made.

    Args:
        studio: of the adapter.
    """

    def __init__(self, studio: Studio) -> None:
        defaults = studio.defaults()
        alike: dict[str, Any] = {"interactive": True}
        self.prompt = gr.Textbox(defaults.prompt, label="Prompt", max_lines=3, **alike)
        with gr.Group():
            self.sliders = {
                name: gr.Slider(0, 1, defaults.interventions.get(name, 0), step=0.05, label=name, buttons=[], **alike)
                for name in studio.concepts
            }
        with gr.Row():
            self.seed = gr.Number(
                defaults.seed, label="Seed", precision=0, minimum=0, maximum=_SEEDS - 1, min_width=90, **alike
            )
            self.lock = gr.Checkbox(
                True, label="Lock the noise", info="Unlocked, each drawing has a new seed.", min_width=150, **alike
            )
        with gr.Accordion("Sampling", open=False):
            self.steps = gr.Slider(
                1,
                _MOST_STEPS,
                defaults.num_inference_steps,
                step=1,
                label="Steps",
                info="More take longer.",
                buttons=[],
                **alike,
            )
            self.guidance = gr.Slider(
                1,
                20,
                defaults.guidance_scale,
                step=0.5,
                label="Guidance",
                info="1 is what the adapter learned.",
                buttons=[],
                **alike,
            )
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", min_width=90)
            self.reset = gr.Button("Clear", min_width=90)
            self.stop = gr.Button("Stop", variant="stop", min_width=90)

    @property
    def inputs(self) -> set[Any]:
        """The components that `settings` reads."""
        return {self.prompt, *self.sliders.values(), self.seed, self.lock, self.steps, self.guidance}

    def settings(self, values: dict[Any, Any]) -> Settings:
        """The settings that the controls show; with a fresh seed if the noise is not locked.

        Args:
            values: by component.

        Raises:
            ValueError: if there is no seed.
        """
        strengths = {name: float(values[slider]) for name, slider in self.sliders.items()}
        seed = values[self.seed] if values[self.lock] else secrets.randbelow(_SEEDS)
        if seed is None:
            raise ValueError("Give a seed, a whole number of 0 or more, or unlock the noise.")
        return Settings(
            prompt=values[self.prompt],
            interventions={name: strength for name, strength in strengths.items() if strength > 0},
            seed=int(seed),
            num_inference_steps=int(values[self.steps]),
            guidance_scale=float(values[self.guidance]),
        )
