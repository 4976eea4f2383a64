"""How close an adapter's counterfactuals of held-out quad images come to the true ones, which the simulator knows.

python benchmarks/counterfactual_quad.py runs/demo/adapter
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from methods.ours import load_pipeline

from diffusers_ctx import embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import counterfactual_error


INTERVENTIONS = (["quad4"], ["quad1"], ["quad1", "quad4"])


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="Folder of the adapter.")
    parser.add_argument("--n", type=int, default=64, help="Number of images.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1_500_000, help="Seed of the images; held out from 1,000,000 on.")
    args = parser.parse_args()

    pipeline = load_pipeline(args.adapter, embedded_base())
    sample = quad.generate(n=args.n, seed=args.seed)
    pixels = torch.from_numpy(sample.images).permute(0, 3, 1, 2) / 255

    def counterfactual(interventions: list[str]) -> np.ndarray:
        output = pipeline.counterfactual(
            pixels,
            interventions,
            prompt=sample.captions,
            num_inference_steps=args.num_inference_steps,
            output_type="pt",
        )
        return to_uint8(output.images)

    with torch.no_grad():
        latents = pipeline.vae.encode(2 * pixels.to(pipeline.device) - 1).latent_dist.mode()
        autoencoded = to_uint8(pipeline.vae.decode(latents).sample / 2 + 0.5)
    unchanged = counterfactual([])
    print(f"no intervention, against the image           {counterfactual_error(unchanged, sample.images):.4f}")
    print(f"no intervention, against the autoencoded one {counterfactual_error(unchanged, autoencoded):.4f}")
    for interventions in INTERVENTIONS:
        truth = sample.counterfactual(interventions).images
        distance = counterfactual_error(counterfactual(interventions), truth)
        baseline = counterfactual_error(sample.images, truth)
        print(f"do({', '.join(interventions)}), against the truth {distance:.3f}; unchanged image {baseline:.3f}")


if __name__ == "__main__":
    main()
