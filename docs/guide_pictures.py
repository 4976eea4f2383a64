"""Draws the pictures of the guides, docs/guide/*.png, from quad and the shipped adapter.

python docs/guide_pictures.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffusers_ctx import ComposablePipeline, embedded_adapter, embedded_base, plot
from diffusers_ctx.adapter import collect_attention
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation.grids import sample_rows
from diffusers_ctx.evaluation.images import to_uint8


FOLDER = Path(__file__).parent / "guide"
CONTEXTS = {"obs": [], "do(quad1)": ["quad1"], "do(quad4)": ["quad4"], "do(quad1, quad4)": ["quad1", "quad4"]}
COLUMNS, SEED, STEPS, SCALE = 8, quad.FIRST_HELD_OUT_SEED, 25, 2
GAP = ((0, 0), (1, 1), (1, 1), (0, 0))


def save(name: str, rows: list[np.ndarray], labels: list[str]) -> None:
    """Writes rows of images with white gaps between them."""
    framed = [np.pad(images, GAP, constant_values=255) for images in rows]
    plot.draw_grid(framed, labels, SCALE).save(FOLDER / name)


def load() -> ComposablePipeline:
    pipe = ComposablePipeline.from_pretrained(embedded_base())
    pipe.load_context_adapter(embedded_adapter("quad"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_contexts() -> None:
    """What a simulator knows: the same scenes in each context."""
    scenes = quad.generate(n=COLUMNS, seed=SEED)
    rows = [scenes.counterfactual(interventions).images for interventions in CONTEXTS.values()]
    save("contexts.png", rows, list(CONTEXTS))


def draw_compositions(pipe: ComposablePipeline) -> None:
    """What the shipped adapter draws: the same noise in each context."""
    prompts = quad.generate(n=COLUMNS, seed=SEED).captions
    rows = sample_rows(pipe, list(CONTEXTS.values()), prompts, SEED, STEPS)
    save("compositions.png", rows, list(CONTEXTS))


def draw_strengths(pipe: ComposablePipeline) -> None:
    """One image while the strength of an intervention grows."""
    strengths = np.linspace(0, 1, COLUMNS)
    noise = torch.randn(1, *pipe.context_module.noise_shape, generator=torch.Generator().manual_seed(0))
    images = pipe(
        ["a picture of a square"] * COLUMNS,
        interventions=[{"quad4": float(strength)} for strength in strengths],
        exogenous_noise=noise.repeat(COLUMNS, 1, 1),
        generator=[torch.Generator().manual_seed(0) for _ in strengths],
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        output_type="np",
    ).images
    save("strengths.png", [to_uint8(images)], ["do(quad4) with strengths from 0 to 1"])


def draw_counterfactuals(pipe: ComposablePipeline) -> None:
    """Real images, what they would have been under do(quad4) by the adapter and by the simulator, and the error."""
    real = quad.generate(n=COLUMNS, seed=SEED)
    truth = real.counterfactual(["quad4"]).images
    found = to_uint8(
        pipe.counterfactual(
            real.images, ["quad4"], prompt=real.captions, num_inference_steps=STEPS, output_type="np"
        ).images
    )
    difference = np.abs(found.astype(int) - truth).max(axis=-1, keepdims=True).repeat(3, axis=-1).astype(np.uint8)
    labels = ["real images", "the adapter's counterfactuals under do(quad4)", "the simulator's", "difference"]
    save("counterfactuals.png", [real.images, found, truth, difference], labels)


def draw_attention(pipe: ComposablePipeline) -> None:
    """Where in images the tokens of each concept act."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    with collect_attention(pipe.unet) as maps:
        images = pipe(
            ["a picture of a square"] * 3,
            interventions=["quad1"],
            generator=generators,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
        ).images
    nodes = pipe.context_module.node_names
    figure = plot.attention_maps(images, maps.mean("up_blocks"), nodes, pipe.concepts)
    figure.savefig(FOLDER / "attention.png", dpi=80)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    pipe = load()
    draw_contexts()
    draw_compositions(pipe)
    draw_strengths(pipe)
    draw_counterfactuals(pipe)
    draw_attention(pipe)


if __name__ == "__main__":
    main()
