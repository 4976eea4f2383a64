"""Draws README's picture of emoji: samples of an adapter beside real drawings of the same roles.

python docs/designs_picture.py diffusers_ctx/assets/designs-context
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from diffusers_ctx import ComposablePipeline, embedded_base
from diffusers_ctx.paths import expand_home, local_path
from diffusers_ctx.plot import image_grid


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from beds.registry import create_bed  # noqa: E402
from measure_bed import REAL_SEED  # noqa: E402


ROWS = {
    "observational": (),
    "do(woman)": ("woman",),
    "do(woman, dark)\nnever shown": ("woman", "dark"),
    "do(woman, dark, vendor)\nnever shown": ("woman", "dark", "vendor"),
}
COLUMNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=expand_home)
    parser.add_argument("--cache_dir", type=local_path, default=ROOT / "runs" / "sources")
    parser.add_argument("--output", type=local_path, default=ROOT / "docs" / "benchmark" / "designs.png")
    args = parser.parse_args()
    bed = create_bed("designs", args.cache_dir)
    pipe = ComposablePipeline.from_pretrained(embedded_base("pictures"))
    pipe.load_context_adapter(args.adapter)
    scene = bed.unseen((), COLUMNS, REAL_SEED)
    options = {"guidance_scale": 1.0, "num_inference_steps": 25, "output_type": "np"}
    rows = []
    for interventions in ROWS.values():
        generator = torch.Generator().manual_seed(0)
        samples = pipe(scene.captions, interventions=list(interventions), generator=generator, **options).images
        gap = np.ones_like(samples[:1])
        rows.append([*samples, *gap, *bed.counterfactual(scene, interventions).images / 255])
    names = ["samples", *[""] * COLUMNS, "real", *[""] * (COLUMNS - 1)]
    image_grid(rows, list(ROWS), names, size=0.6).savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
