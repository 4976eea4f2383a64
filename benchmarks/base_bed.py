"""How often a base draws what prompts ask for, read from its samples by a test bed's readers.

    python benchmarks/base_bed.py designs diffusers_ctx/assets/pictures-base --picture base.png

Prompts are captions of observational images. The picture shows these and below each row the samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from beds.registry import BEDS, create_bed
from grids import join_tiles
from measure_bed import REAL_SEED, at_resolution, shares_right
from methods.plain import load_plain, sample_prompts

from diffusers_ctx.paths import expand_home, local_path


_COLUMNS = 12
_SAMPLE_SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=BEDS)
    parser.add_argument("base", type=expand_home, help="Folder of the pipeline.")
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--picture", type=local_path)
    parser.add_argument("--cache_dir", type=local_path, default=Path("runs/sources"), help="What beds are made from.")
    args = parser.parse_args()
    bed = create_bed(args.bed, args.cache_dir)
    real = bed.unseen((), args.n, REAL_SEED)
    samples = sample_prompts(
        load_plain(args.base), real.captions, _SAMPLE_SEED, args.num_inference_steps, args.guidance_scale
    )
    samples = at_resolution(samples, bed.resolution)
    read, read_of_real = bed.read(samples), bed.read(real.images)
    shares = shares_right(bed, read, real.attributes, real.attributes, read_of_real)
    print(json.dumps({"n": len(samples), "prompt_met": shares["subject"]}))
    if args.picture is not None:
        starts = range(0, len(samples) // _COLUMNS * _COLUMNS, _COLUMNS)
        rows = [images[start : start + _COLUMNS] for start in starts for images in (real.images, samples)]
        join_tiles(rows).save(args.picture)


if __name__ == "__main__":
    main()
