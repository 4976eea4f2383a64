"""Writes a test bed's training images, a folder for each context, and a contact sheet of all its real images.

    python benchmarks/write_bed.py designs --output runs/designs --n 32
    python benchmarks/write_bed.py digits --output runs/digits --readers 500

Folders go to `train`, below `--output`. What a bed is made from is fetched to `--cache_dir`; docs/beds has a page for
each bed, with sources and licenses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beds.bed import Bed
from beds.registry import BEDS, create_bed

from diffusers_ctx.paths import local_path


COLUMNS = 12


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=BEDS)
    parser.add_argument("--output", type=local_path, required=True)
    parser.add_argument("--n", type=int, help="Images of each context; by default all, or as many as its tables have.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache_dir", type=local_path, default=Path("runs/sources"))
    parser.add_argument(
        "--readers",
        type=int,
        metavar="N",
        help="Write readers' errors on N real images of each context to readers.md.",
    )
    return parser.parse_args()


def render_errors(bed: Bed, n: int, seed: int) -> str:
    """Readers' errors on `n` images of each context and combination, as a table in Markdown."""
    names = [attribute.name for attribute in bed.attributes]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for interventions in (*bed.contexts.values(), *bed.held_out):
        errors = bed.reading_error(bed.unseen(interventions, n, seed))
        lines.append(f"| {'+'.join(interventions) or 'obs'} | {' | '.join(f'{errors[name]:.3f}' for name in names)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse_args()
    bed = create_bed(args.bed, args.cache_dir)
    errors = render_errors(bed, args.readers, args.seed) if args.readers else ""
    bed.write_folders(args.output / "train", args.n, args.seed)
    bed.contact_sheet(min(COLUMNS, args.n or COLUMNS), args.seed).save(args.output / "contact_sheet.png")
    if errors:
        (args.output / "readers.md").write_text(errors, encoding="utf-8")


if __name__ == "__main__":
    main()
