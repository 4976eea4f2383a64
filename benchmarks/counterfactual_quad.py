"""Distance of an adapter's counterfactuals of held-out quad images to the simulator's, and the axioms.

python benchmarks/counterfactual_quad.py runs/demo/adapter
"""

from __future__ import annotations

import argparse

import numpy as np
from measure import may_move
from methods.context_adapter import load_pipeline
from provenance import write_metrics

from diffusers_ctx import ComposablePipeline, embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import (
    counterfactual_effectiveness,
    counterfactual_error,
    counterfactual_minimality,
    read_attributes,
)
from diffusers_ctx.evaluation.features import autoencode
from diffusers_ctx.evaluation.images import to_uint8
from diffusers_ctx.evaluation.quad_attributes import attribute_difference
from diffusers_ctx.paths import expand_home, local_path


INTERVENTIONS = (("quad4",), ("quad1",), ("quad1", "quad4"))
ROUNDS = 10


class Counterfactuals:
    """Counterfactuals of images (n, 64, 64, 3) uint8 by an adapter.

    Args:
        pipeline: the pipeline, with the adapter.
        captions: captions of the images.
        num_inference_steps: steps of inversion, and of sampling.
    """

    def __init__(self, pipeline: ComposablePipeline, captions: list[str], num_inference_steps: int):
        self.pipeline = pipeline
        self.options = {"prompt": captions, "num_inference_steps": num_inference_steps, "output_type": "np"}

    def __call__(
        self, images: np.ndarray, interventions: tuple[str, ...], factual: tuple[str, ...] = ()
    ) -> np.ndarray:
        output = self.pipeline.counterfactual(images, list(interventions), list(factual), **self.options)
        return to_uint8(output.images)

    def autoencoded(self, images: np.ndarray) -> np.ndarray:
        return autoencode(self.pipeline.vae, images)


def measure_intervention(
    counterfactuals: Counterfactuals, sample: quad.QuadSample, of_images: np.ndarray, interventions: tuple[str, ...]
) -> dict[str, float]:
    """Errors of pixels in [0, 1], and of attributes in unit coordinates; lower is better.

    `of_images` are the attributes (n, F) that are read off the sample's images.
    """
    truth = sample.counterfactual(interventions).images
    made = counterfactuals(sample.images, interventions)
    back = counterfactuals(made, (), factual=interventions)
    read, of_truth = (read_attributes(images).values for images in (made, truth))
    moves = np.array([name in may_move(interventions, sample.dependent) for name in quad.FACTORS])
    effect = counterfactual_effectiveness(read, of_truth, attribute_difference)
    return {
        "error": counterfactual_error(made, truth),
        "error_unchanged": counterfactual_error(sample.images, truth),
        "effectiveness": float(np.nanmean(effect[[quad.FACTORS.index(name) for name in interventions]])),
        "minimality": float(np.nanmean(counterfactual_minimality(of_images, read, ~moves, attribute_difference))),
        "reversibility": counterfactual_error(back, sample.images),
    }


def measure_composition(counterfactuals: Counterfactuals, sample: quad.QuadSample) -> dict[str, float]:
    """Error of counterfactuals without an intervention, after one round and after many."""
    unchanged = once = counterfactuals(sample.images, ())
    for _ in range(ROUNDS - 1):
        unchanged = counterfactuals(unchanged, ())
    return {
        "once": counterfactual_error(once, sample.images),
        "once, against the autoencoded image": counterfactual_error(once, counterfactuals.autoencoded(sample.images)),
        f"{ROUNDS} rounds": counterfactual_error(unchanged, sample.images),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=expand_home, help="Folder of the adapter.")
    parser.add_argument("--n", type=int, default=64, help="Number of images.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1_500_000, help="Seed of the images; held out from 1,000,000 on.")
    parser.add_argument("--output", type=local_path, help="File for the metrics.")
    args = parser.parse_args()

    sample = quad.generate(n=args.n, seed=args.seed)
    counterfactuals = Counterfactuals(
        load_pipeline(args.adapter, embedded_base()), sample.captions, args.num_inference_steps
    )
    composition = measure_composition(counterfactuals, sample)
    for name, error in composition.items():
        print(f"no intervention, {name}: {error:.4f}", flush=True)
    interventions, of_images = {}, read_attributes(sample.images).values
    for names in INTERVENTIONS:
        metrics = interventions["+".join(names)] = measure_intervention(counterfactuals, sample, of_images, names)
        print(
            f"do({', '.join(names)}): " + ", ".join(f"{key} {value:.3f}" for key, value in metrics.items()), flush=True
        )
    options = {"n": args.n, "num_inference_steps": args.num_inference_steps, "seed": args.seed}
    write_metrics(args.output, args.adapter, options, {"composition": composition, "interventions": interventions})


if __name__ == "__main__":
    main()
