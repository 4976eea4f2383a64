"""Draws README's picture, five rows of `docs/benchmark/compositions.png`.

python docs/overview_picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from figures import draw_compositions  # noqa: E402


LABELS = {
    "ours": "context adapter",
    "labels-only": "context labels alone",
    "lora-per-context": "one LoRA per context,\nadded",
    "prompt-lora": "one LoRA, contexts\nnamed in the prompt",
}


def main() -> None:
    results = ROOT / "benchmarks" / "results" / "quad" / "dependent-seed0-images4000-steps1000"
    figure = draw_compositions(results, list(LABELS), dependent=True)
    for axes in figure.axes:
        label = axes.get_ylabel()
        axes.set_ylabel(LABELS.get(label, label), rotation=0, horizontalalignment="right", verticalalignment="center")
    figure.savefig(ROOT / "docs" / "benchmark" / "overview.png", dpi=96)


if __name__ == "__main__":
    main()
