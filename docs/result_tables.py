"""Fills the tables of README, docs and model cards with what benchmarks/results holds.

    python docs/result_tables.py

In a page, `<!-- table: NAME -->` starts a table and `<!-- end -->` ends it; NAME is a key of `TABLES`. A test fails
while a page and the results differ.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    "README.md",
    "benchmarks/README.md",
    "docs/bases.md",
    "docs/demo.md",
    "docs/evaluation.md",
    "docs/method.md",
    "docs/results.md",
    "docs/sampling.md",
    "docs/training.md",
    "diffusers_ctx/assets/quad-base/README.md",
    "diffusers_ctx/assets/quad-context/README.md",
]
CONCEPTS = ("quad1", "quad2", "quad3", "quad4", "size", "orientation")
FACTORS = ("quad1", "quad2", "quad3", "quad4", "size", "color", "shape", "orientation")  # the order of matrices

# what a method is called in README and docs, its name in the results, and the seeds that it has
METHODS = {
    "**context adapter**": ("ours", (0, 1, 2)),
    "context adapter, true graph given": ("ours-graph", (0,)),
    "mode `frozen`: the UNet does not learn": ("frozen", (0,)),
    "mode `full`, whose posterior reads latents": ("full", (0,)),
    "context adapter, the paper's causal layer (reduced form)": ("ours-reduced", (0,)),
    "context labels alone, no noise and no graph": ("labels-only", (0, 1, 2)),
    "one LoRA per context, added": ("lora-per-context", (0, 1, 2)),
    "the paper's setting: a light VAE, no diffusion": ("paper-vae", (0,)),
    "amortized posterior, without the rest of the concept stage": ("amortized", (0,)),
    "one LoRA, contexts named, scores added (Composable Diffusion)": ("composable-diffusion", (0,)),
    "one LoRA, contexts named in the prompt": ("prompt-lora", (0,)),
    "amortized posterior without the context": ("posterior-untold", (0,)),
    "one LoRA, contexts named, one slider per concept (Concept Sliders)": ("concept-sliders", (0,)),
    "one LoRA without context names": ("base-pooled", (0,)),
    "context module without contexts": ("module-pooled", (0,)),
    "one LoRA, observational images alone": ("base", (0,)),
    "*bound: the simulator's noise and mechanisms given*": ("oracle", (0,)),
    "*bound: real images, encoded and decoded*": ("autoencoder", (0,)),
}
HEADLINE = ("ours", "ours-reduced", "labels-only", "lora-per-context", "prompt-lora", "autoencoder")


@cache
def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def run(
    method: str, seed: int = 0, images: int = 4000, steps: int = 1000, variant: str = "dependent"
) -> dict[str, Any]:
    """Results of one run of the comparison on quad."""
    return load(f"quad/{variant}-seed{seed}-images{images}-steps{steps}/{method}.json")


def combinations(contexts: dict[str, Any], interventions: int) -> list[str]:
    """Names of the combinations of this many interventions."""
    return [name for name in contexts if len([part for part in name.split("+") if part != "obs"]) == interventions]


def mean(contexts: dict[str, Any], names: Iterable[str] | int, key: str = "debiased") -> float:
    """Mean of a metric over combinations, or over all of this many interventions, where it was measured."""
    names = combinations(contexts, names) if isinstance(names, int) else names
    return float(np.mean([contexts[name][key] for name in names if contexts[name].get(key) is not None]))


def conformity(contexts: dict[str, Any], names: Iterable[str] | int) -> float:
    """Mean conformity of samples, divided by that of real images."""
    names = combinations(contexts, names) if isinstance(names, int) else list(names)
    return mean(contexts, names, "conformity") / mean(contexts, names, "conformity_real")


def drift(contexts: dict[str, Any], key: str = "drift") -> float:
    """Mean over single interventions and pairs."""
    return mean(contexts, [*combinations(contexts, 1), *combinations(contexts, 2)], key)


def over_seeds(method: str, metric: Callable[[dict[str, Any]], float]) -> float:
    """Mean of a metric of the combinations over the seeds of a method."""
    seeds = next(seeds for name, seeds in METHODS.values() if name == method)
    return float(np.mean([metric(run(method, seed)["contexts"]) for seed in seeds]))


def table(header: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines in Markdown; all columns but the first are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def comparison(names: Iterable[str] | None = None, with_drift: bool = False) -> list[str]:
    header = ["", "seeds", "single", "9 pairs", "3 triples", "pairs − single", "conformity of pairs"]
    rows = []
    for label, (name, seeds) in METHODS.items():
        if names is None or name in names:
            single, pairs, triples = (over_seeds(name, lambda c, count=count: mean(c, count)) for count in (1, 2, 3))
            metrics = [single, pairs, triples, pairs - single, over_seeds(name, lambda c: conformity(c, 2))]
            metrics += [over_seeds(name, drift)] if with_drift else []
            bold = "**" if name == "ours" else ""
            rows.append([label, str(len(seeds)), *(f"{bold}{metric:.3f}{bold}" for metric in metrics)])
    return table(header + ["drift"] * with_drift, rows)


def by_kind() -> list[str]:
    """Pairs apart by what they set: quadrants alone, or size or orientation beside one."""
    kinds = {"quads": (), "with size": ("size",), "with orientation": ("orientation",)}
    rows = []
    for label, (name, _) in METHODS.items():
        if name in ("ours", "labels-only", "lora-per-context", "prompt-lora", "oracle"):
            cells = []
            for parts in kinds.values():
                chosen = [
                    pair
                    for pair in combinations(run(name)["contexts"], 2)
                    if set(pair.split("+")) & {"size", "orientation"} == set(parts)
                ]
                cells += [
                    over_seeds(name, lambda c, chosen=chosen: mean(c, chosen)),
                    over_seeds(name, lambda c, chosen=chosen: conformity(c, chosen)),
                ]
            rows.append([label.strip("*"), *(f"{cell:.3f}" for cell in cells)])
    header = [cell for kind in kinds for cell in (f"{kind}: distance", "conformity")]
    return table(["pairs", *header], rows)


def effect_of_singles() -> list[str]:
    """How far do(x) moves x in one image: the diagonal of the interference matrix."""
    names = {
        "context adapter": "ours",
        "context labels alone": "labels-only",
        "one LoRA per context": "lora-per-context",
    }
    names |= {"one LoRA, contexts named": "prompt-lora", "simulator's noise given": "oracle"}
    matrices = {label: np.array(run(name)["interference"]["matrix"], dtype=float) for label, name in names.items()}
    matrices["*truth*"] = np.array(run("ours")["interference"]["true_matrix"], dtype=float)
    places = [FACTORS.index(concept) for concept in CONCEPTS]
    rows = [[label, *(f"{matrix[i, j]:.2f}" for i, j in enumerate(places))] for label, matrix in matrices.items()]
    return table(["do(x) moves x by", *CONCEPTS], rows)


def structural_form() -> list[str]:
    names = ["quad1+quad4", "quad2+quad3", "quad2+quad4", "quad1+quad3", "quad1+quad2", "quad1+quad2+quad4"]
    methods = ("ours", "ours-graph", "ours-reduced")
    rows = [
        [f"do({name.replace('+', ', ')})", *(f"{run(m)['contexts'][name]['debiased']:.3f}" for m in methods)]
        for name in names
    ]
    return table(["seed 0, debiased", "learned graph", "true graph given", "reduced form"], rows)


def steps_and_images() -> list[str]:
    runs = [(steps, 4000) for steps in (250, 500, 1000, 2000)] + [(1000, images) for images in (1000, 300, 100)]
    rows = []
    for steps, images in runs:
        results = (
            load("quad-ours-seed0-n500.json") if (steps, images) == (1000, 4000) else run("ours", 0, images, steps)
        )
        graph = results["graph"]
        contexts = results["contexts"]
        cells = [f"{mean(contexts, count):.3f}" for count in range(4)]
        rows.append([f"{steps:,}", f"{images:,}", *cells, f"{graph['auroc']:.2f}", str(graph["shd"])])
    return table(["UNet steps", "images per context", "obs", "single", "pairs", "triples", "AUROC", "SHD"], rows)


def shipped() -> list[str]:
    """The shipped adapter at n = 10,000: the observational context and the means."""
    contexts = load("quad-context.json")["contexts"]
    labels = ["observational", "mean of 6 single interventions", "mean of 9 held-out pairs", "mean of 3 triples"]
    rows = []
    for count, label in enumerate(labels):
        cells = [f"{mean(contexts, count, key):.4f}" for key in ("swd", "floor", "debiased")]
        read = [f"{mean(contexts, count, key):.3f}" if count else "" for key in ("conformity", "conformity_real")]
        rows.append([label, *cells, *read])
    return table(["n = 10,000", "distance", "floor", "debiased", "conformity", "of real images"], rows)


def shipped_combinations() -> list[str]:
    """The shipped adapter at n = 10,000, one combination a line: the table of its card."""
    contexts = load("quad-context.json")["contexts"]
    rows = []
    for name, found in contexts.items():
        low, high = found["interval"]
        read = [f"{found[key]:.3f}" if key in found else "" for key in ("conformity", "conformity_real")]
        distances = [f"{found['swd']:.4f}", f"{low:.3f} to {high:.3f}"]
        distances += [f"{found['floor']:.4f}", f"{found['debiased']:.4f}"]
        rows.append([name.replace("+", " + "), *distances, *read])
    for count, label in enumerate(
        ("mean of 6 single interventions", "mean of 9 held-out pairs", "mean of 3 triples"), 1
    ):
        swd, floor, debiased = (f"{mean(contexts, count, key):.4f}" for key in ("swd", "floor", "debiased"))
        read = [f"{mean(contexts, count, key):.3f}" for key in ("conformity", "conformity_real")]
        rows.append([f"**{label}**", swd, "", floor, debiased, *read])
    header = ["", "distance", "95 % interval", "floor", "debiased", "conformity", "of real images"]
    return table(header, rows)


def fresh_combinations() -> list[str]:
    contexts = load("quad-context-fresh.json")["contexts"]
    rows = []
    for name, found in contexts.items():
        distances = [f"{found[key]:.3f}" for key in ("swd", "floor", "debiased")]
        rows.append(
            [name.replace("+", " + "), *distances, *(f"{found[k]:.3f}" for k in ("conformity", "conformity_real"))]
        )
    return table(["n = 1,000", "distance", "floor", "debiased", "conformity", "of real images"], rows)


def independent_variant() -> list[str]:
    runs = {
        "context adapter": run("ours", variant="independent"),
        "the same, earlier code and twice the UNet steps": run("ours", steps=2000, variant="independent"),
        "context labels alone": run("labels-only", variant="independent"),
        "one LoRA without context names": run("base-pooled", variant="independent"),
    }
    rows = []
    for label, results in runs.items():
        contexts = results["contexts"]
        cells = [*(mean(contexts, count) for count in range(4)), conformity(contexts, 2), drift(contexts)]
        rows.append([label, *(f"{cell:.3f}" for cell in cells)])
    return table(["seed 0", "obs", "single", "pairs", "triples", "conformity of pairs", "drift"], rows)


def prompts() -> list[str]:
    results = load("quad-context-prompts.json")
    rows = []
    for name in ("obs", "size", "orientation", "quad1+quad4"):
        without, matching = results[name]["any"], results[name]["matching"]
        cells = [f"{found['shape_met']:.2f}" for found in (without, matching)]
        cells += [f"{found[key]:.3f}" for key in ("swd", "drift") for found in (without, matching)]
        rows.append(["observational" if name == "obs" else f"do({name.replace('+', ', ')})", *cells])
    header = [cell for name in ("shape met", "raw distance", "drift") for cell in (f"{name}, off", "on")]
    return table(["`match_prompt`", *header], rows)


def quad_base() -> list[str]:
    measured = load("quad-base.json")["num_inference_steps"]
    rows = []
    for steps, found in measured.items():
        cells = [f"{found[key]:.4f}" for key in ("swd", "floor", "debiased")]
        rows.append([f"samples, {steps} DDIM steps", *cells, f"{found['shape_met']:.2f}", f"{found['drift']:.3f}"])
    real = next(iter(measured.values()))
    rows.append(
        [
            "other real images",
            f"{real['floor']:.4f}",
            "",
            "",
            f"{real['shape_met_real']:.2f}",
            f"{real['drift_real']:.3f}",
        ]
    )
    return table([f"n = {real['n']}", "distance", "real to real", "debiased", "shape met", "drift"], rows)


def counterfactuals() -> list[str]:
    results = load("quad-context-counterfactuals.json")
    rows = []
    for name, found in results["interventions"].items():
        keys = ("error", "error_unchanged", "effectiveness", "minimality", "reversibility")
        rows.append([f"do({name.replace('+', ', ')})", *(f"{found[key]:.3f}" for key in keys)])
    header = ["error", "error of the unchanged image", "effectiveness", "minimality", "reversibility"]
    return table(["64 images", *header], rows)


def concepts() -> list[str]:
    results = load("quad-context-concepts.json")
    rows = [["correlation with the true factor", *(f"{results['correlations'][concept]:.2f}" for concept in CONCEPTS)]]
    return table(["shipped adapter, 2,000 images", *CONCEPTS], rows)


def epsilon_bases() -> list[str]:
    rows = load("epsilon_base.json")["methods"]
    labels = {
        "epsilon": "as it is, mode `lora`",
        "noise-offset": "`--noise_offset 0.1`",
        "high-noise": "`--timestep_sampling high_noise`",
        "v-prediction-lora": "`--prediction_type v_prediction --rescale_betas_zero_snr`, mode `lora`",
        "v-prediction-full": "the same, mode `full`",
        "v-base": "*a base that was trained so from the start, mode `lora`*",
    }
    names = ("obs", "quad4", "quad1", "quad1+quad4")
    cells = [
        [label, *(f"{rows[key]['contexts'][name]['debiased']:.3f}" for name in names)] for key, label in labels.items()
    ]
    header = ["obs" if name == "obs" else f"do({name.replace('+', ', ')})" for name in names]
    return table(["ε-prediction base, n = 500", *header], cells)


def step_times() -> list[str]:
    cases = load("train_step.json")["cases"]
    labels = {"plain-lora": "plain LoRA, as in diffusers' script", "frozen": "`frozen`", "lora": "`lora`"}
    labels |= {"lora-first-share": "`lora` before `--unfreeze_after`", "full": "`full`"}
    rows = []
    for key, label in labels.items():
        case = cases[key]
        low, high = case["to_plain_lora"]["interval"]
        interval = "" if key == "plain-lora" else f"{low:.2f} to {high:.2f}"
        cells = [f"{1000 * case['median_seconds']:.0f}", f"{case['to_plain_lora']['ratio']:.2f}", interval]
        rows.append([label, *cells, f"{case['optimizer_parameters']:,}", f"{case['peak_mib']:.0f}"])
    header = ["ms a step", "of plain LoRA", "95 % interval", "trained weights", "peak MiB"]
    return table(["small model, batch 16, one CPU core", *header], rows)


def full_size() -> list[str]:
    results = load("full_size_h100.json")
    cases = {
        "SD 1.5, plain LoRA": results["sd15-tf32"]["plain-lora"],
        "SD 1.5, `frozen`": results["sd15-tf32"]["frozen"],
        "SD 1.5, `lora`": results["sd15-tf32"]["lora"],
        "SDXL, `frozen`": results["sdxl-bf16"]["frozen"],
        "SDXL, `lora`": results["sdxl-bf16"]["lora"],
    }
    rows = []
    for label, case in cases.items():
        weights = case["learned_parameters"]
        cells = [f"{case['median_ms']:,.0f}", f"{case['peak_mib'] / 1024:.1f}", f"{weights / 1e6:.1f} M"]
        rows.append([label, *cells, f"{4 * weights / 1e6:,.0f} MB"])
    return table(["random weights, one H100", "ms a step", "peak GiB", "trained weights", "in float32"], rows)


def adapter_sizes() -> list[str]:
    results = load("adapter_sizes.json")
    rows = []
    for name, case in results.items():
        if name != "concepts":
            module, others = case["context_module"], case["attention"] + case["lora"]
            weights = [case["attention"], case["lora"], module]
            bytes_of = [4 * (others + module), 2 * others + 4 * module]
            rows.append([name, *(f"{n / 1e6:.1f} M" for n in weights), *(f"{n / 1e6:,.0f} MB" for n in bytes_of)])
    return table(["mode `lora`", "keys and values", "LoRA", "context module", "on disk", "in float16"], rows)


def seeds_of_the_comparison() -> list[str]:
    """What `python benchmarks/quad.py --table` prints of the dependent variant with 4,000 images."""
    sys.path.append(str(ROOT / "benchmarks"))
    from tables import render_tables

    sections = render_tables(RESULTS / "quad").split("\n\n### ")
    chosen = [section for section in sections if re.match(r"(### )?dependent-seed\d-images4000-steps1000\n", section)]
    return ("### " + "\n\n### ".join(section.removeprefix("### ") for section in chosen)).split("\n")


TABLES: dict[str, Callable[[], list[str]]] = {
    "headline": lambda: comparison(HEADLINE),
    "comparison": lambda: comparison(with_drift=True),
    "by-kind": by_kind,
    "effect-of-singles": effect_of_singles,
    "structural-form": structural_form,
    "steps-and-images": steps_and_images,
    "shipped": shipped,
    "shipped-combinations": shipped_combinations,
    "fresh-combinations": fresh_combinations,
    "independent-variant": independent_variant,
    "quad-base": quad_base,
    "prompts": prompts,
    "counterfactuals": counterfactuals,
    "concepts": concepts,
    "epsilon-bases": epsilon_bases,
    "step-times": step_times,
    "full-size": full_size,
    "adapter-sizes": adapter_sizes,
    "seeds-of-the-comparison": seeds_of_the_comparison,
}
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with its tables as the results have them."""
    return _BLOCK.sub(lambda block: block[1] + "\n" + "\n".join(TABLES[block[2]]()) + "\n\n" + block[4], text)


def without_tables(text: str) -> str:
    """A page without its generated tables."""
    return _BLOCK.sub("", text)


if __name__ == "__main__":
    for page in (ROOT / name for name in PAGES):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
