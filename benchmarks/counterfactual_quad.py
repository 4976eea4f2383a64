"""How close an adapter's counterfactuals of held-out quad images come to the true ones, which the simulator knows, and
how well they keep to the axioms.

python benchmarks/counterfactual_quad.py runs/demo/adapter
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from measure import may_move
from methods.ours import load_pipeline
from provenance import write_figures

from diffusers_ctx import ComposablePipeline, embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import (
    counterfactual_composition,
    counterfactual_effectiveness,
    counterfactual_error,
    counterfactual_minimality,
    counterfactual_reversibility,
    read_attributes,
)
from diffusers_ctx.evaluation.quad_attributes import attribute_difference


INTERVENTIONS = (("quad4",), ("quad1",), ("quad1", "quad4"))
ROUNDS = 10


class Counterfactuals:
    """Of images (n, 64, 64, 3) uint8, as an adapter makes them.

    Args:
        pipeline: the pipeline, with the adapter.
        captions: of the images.
        num_inference_steps: there, and back.
    """

    def __init__(self, pipeline: ComposablePipeline, captions: list[str], num_inference_steps: int):
        self.pipeline = pipeline
        self.options = {"prompt": captions, "num_inference_steps": num_inference_steps, "output_type": "pt"}

    def __call__(
        self, images: np.ndarray, interventions: tuple[str, ...], factual: tuple[str, ...] = ()
    ) -> np.ndarray:
        output = self.pipeline.counterfactual(_to_pixels(images), list(interventions), list(factual), **self.options)
        return _to_uint8(output.images)

    @torch.no_grad()
    def autoencoded(self, images: np.ndarray) -> np.ndarray:
        vae = self.pipeline.vae
        latents = vae.encode(2 * _to_pixels(images).to(self.pipeline.device) - 1).latent_dist.mode()
        return _to_uint8(vae.decode(latents).sample / 2 + 0.5)


def measure_intervention(
    counterfactuals: Counterfactuals, sample: quad.QuadSample, interventions: tuple[str, ...]
) -> dict[str, float]:
    """Errors of pixels in [0, 1], and of attributes in unit coordinates; lower is better."""
    truth = sample.counterfactual(interventions).images
    made = counterfactuals(sample.images, interventions)
    back = counterfactuals(made, (), factual=interventions)
    read, of_truth, of_images = (read_attributes(images).values for images in (made, truth, sample.images))
    moves = np.array([name in may_move(interventions, sample.dependent) for name in quad.FACTORS])
    effect = counterfactual_effectiveness(read, of_truth, attribute_difference)
    return {
        "error": counterfactual_error(made, truth),
        "error_unchanged": counterfactual_error(sample.images, truth),
        "effectiveness": float(np.nanmean(effect[[quad.FACTORS.index(name) for name in interventions]])),
        "minimality": float(np.nanmean(counterfactual_minimality(of_images, read, ~moves, attribute_difference))),
        "reversibility": counterfactual_reversibility(sample.images, back),
    }


def measure_composition(counterfactuals: Counterfactuals, sample: quad.QuadSample) -> dict[str, float]:
    """What is left of images under no intervention, once and many times over."""
    unchanged = once = counterfactuals(sample.images, ())
    for _ in range(ROUNDS - 1):
        unchanged = counterfactuals(unchanged, ())
    return {
        "once": counterfactual_composition(sample.images, once),
        "once, against the autoencoded image": counterfactual_composition(
            counterfactuals.autoencoded(sample.images), once
        ),
        f"{ROUNDS} rounds": counterfactual_composition(sample.images, unchanged),
    }


def _to_pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def _to_uint8(pixels: torch.Tensor) -> np.ndarray:
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="Folder of the adapter.")
    parser.add_argument("--n", type=int, default=64, help="Number of images.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1_500_000, help="Seed of the images; held out from 1,000,000 on.")
    parser.add_argument("--output", type=Path, help="File for the figures.")
    args = parser.parse_args()

    sample = quad.generate(n=args.n, seed=args.seed)
    counterfactuals = Counterfactuals(
        load_pipeline(args.adapter, embedded_base()), sample.captions, args.num_inference_steps
    )
    composition = measure_composition(counterfactuals, sample)
    for name, figure in composition.items():
        print(f"no intervention, {name}: {figure:.4f}", flush=True)
    interventions = {}
    for names in INTERVENTIONS:
        figures = interventions["+".join(names)] = measure_intervention(counterfactuals, sample, names)
        print(
            f"do({', '.join(names)}): " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True
        )
    options = {"n": args.n, "num_inference_steps": args.num_inference_steps, "seed": args.seed}
    write_figures(args.output, args.adapter, options, {"composition": composition, "interventions": interventions})


if __name__ == "__main__":
    main()
