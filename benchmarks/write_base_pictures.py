"""Writes the pictures of the test beds, pooled: captioned folders for train_scripts/train_base.py.

    python benchmarks/write_base_pictures.py --output runs/pictures

No held-out combination is among them. docs/beds names sources and licenses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beds.bed import write_folder
from beds.registry import create_bed

from diffusers_ctx.paths import local_path


SOURCES = ("designs", "digits", "photographs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=local_path, required=True)
    parser.add_argument("--cache_dir", type=local_path, default=Path("runs/sources"))
    args = parser.parse_args()
    for source in SOURCES:
        for part, (images, captions) in enumerate(create_bed(source, args.cache_dir).pooled()):
            write_folder(args.output / f"{source}-{part}", images, captions)
            print(f"{source}-{part}: {len(images)} images", flush=True)


if __name__ == "__main__":
    main()
