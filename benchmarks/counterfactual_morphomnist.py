"""The references of the counterfactual benchmark on MorphoMNIST, beside the published rows; see beds/morphomnist.py.

python benchmarks/counterfactual_morphomnist.py --data FOLDER
"""

from __future__ import annotations

import argparse
import json

from beds.morphomnist import MorphoReaders, Operations, do_nothing, errors, evaluate, load, render_table

from diffusers_ctx.paths import local_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=local_path, required=True, help="Folder of the test digits.")
    parser.add_argument("--n", type=int, default=10_000, help="Measure the first digits alone, for a quick look.")
    parser.add_argument("--output", type=local_path, help="JSON file for the metrics.")
    args = parser.parse_args()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    digits = load(args.data)
    readers = MorphoReaders(digits)
    digits = digits.first(args.n)
    print("Readers on the digits themselves:", errors(readers.read(digits.images), digits.values), flush=True)
    metrics = {
        "does nothing": evaluate(do_nothing, digits, readers),
        "image operations": evaluate(Operations(readers), digits, readers),
    }
    print(render_table(metrics))
    if args.output:
        args.output.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
