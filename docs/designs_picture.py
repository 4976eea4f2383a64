"""Draws README's picture: real drawings, and below each row what a context adapter makes of the same prompts.

    python docs/designs_picture.py
    python docs/designs_picture.py --adapter runs/compare/designs-seed0-images32-steps600/ours

Prompts are the first of the bed's; nothing is chosen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from beds.registry import create_bed  # noqa: E402
from measure_bed import REAL_SEED  # noqa: E402
from methods.context_adapter import adapter_sampler, load_pipeline  # noqa: E402

from diffusers_ctx import embedded_adapter, embedded_base  # noqa: E402
from diffusers_ctx.paths import expand_home, local_path  # noqa: E402
from diffusers_ctx.plot import image_grid  # noqa: E402


ROWS = {
    "ordinary": (),
    "dark": ("dark",),
    "woman + dark": ("woman", "dark"),
    "woman + dark\n+ vendor": ("woman", "dark", "vendor"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=expand_home, help="Its folder; by default the shipped one.")
    parser.add_argument("--output", type=local_path, default=ROOT / "docs" / "designs.png")
    parser.add_argument("--columns", type=int, default=12)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache_dir", type=local_path, default=ROOT / "runs" / "sources")
    args = parser.parse_args()

    bed = create_bed("designs", args.cache_dir)
    pipeline = load_pipeline(args.adapter or embedded_adapter("designs"), embedded_base("pictures"))
    scales = {"guidance_scale": args.guidance_scale}
    sample = adapter_sampler(pipeline, args.num_inference_steps, match_prompt=None, **scales)
    rows, names = [], []
    for name, interventions in ROWS.items():
        real = bed.unseen(interventions, args.columns, REAL_SEED)
        rows += [list(real.images), list(sample(real.captions, interventions, args.seed))]
        names += [name, "real above,\nadapter below"] if not names else [name, ""]
    image_grid(rows, names, size=0.62).savefig(args.output, dpi=96)


if __name__ == "__main__":
    main()
