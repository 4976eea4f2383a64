"""The concept stage alone, on the demo's images: how long it takes, and what it learns about quad.

    python benchmarks/concept_stage.py --seeds 0 1 2

Images are encoded once. A run's metrics go to the results file as soon as they are measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ot
import torch
from concepts_quad import infer_nodes
from measure import TRIPLES, measure_graph
from provenance import commit, machine

from diffusers_ctx import ComposablePipeline, embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.training import ContextTrainer, TrainingConfig
from diffusers_ctx.training.concepts.stage import ConceptStage
from diffusers_ctx.training.config import ContextConfig, DataConfig, ModelConfig, OptimizationConfig, OutputConfig


RESULTS = Path(__file__).parent / "results" / "concept_stage.json"
COMPOSITIONS = (*quad.HELD_OUT_PAIRS, *TRIPLES)
_PAIRS_SEED = 3_000_000  # held out
_PROJECTIONS = 500


def learn(data: Path, seed: int, cache: Path) -> tuple[ComposablePipeline, dict[str, Any]]:
    """A pipeline whose context module has learned the concepts, and seconds and last metrics of the stage."""
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    config = TrainingConfig(
        ModelConfig(embedded_base()),
        DataConfig(
            train_data_dir=str(data),
            concepts=list(quad.CONCEPTS),
            resolution=quad.RESOLUTION,
            cache_latents=True,
            cache_dir=str(cache),
        ),
        ContextConfig(),
        OptimizationConfig(seed=seed, max_train_steps=1),
        OutputConfig(output_dir=str(cache / f"seed-{seed}"), report_to="none"),
    )
    trainer = ContextTrainer(config, pipeline)
    trainer.load()
    with trainer.open():
        trainer.encode()
        stage = ConceptStage(
            trainer.accelerator, trainer.context_module, trainer.latents, trainer.config.context, seed
        )
        wall, processor = time.perf_counter(), time.process_time()
        last = stage.run()
        times = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
    return pipeline, times | {"last_metrics": last}


@torch.no_grad()
def measure(pipeline: ComposablePipeline, n: int) -> dict[str, Any]:
    """What the nodes hold of held-out images.

    Returns:
        `correlations` of each concept's node with its factor; of the graph what `measure_graph` returns; and `pairs`,
        the sliced Wasserstein distance between node values that are sampled in a composition and those of real images
        of it, in standard deviations of observational values, with the mean over compositions.
    """
    module = pipeline.context_module
    sample = quad.generate(n=n, seed=quad.FIRST_HELD_OUT_SEED)
    _, values = infer_nodes(pipeline, sample.images)
    factors = sample.factors[:, [quad.FACTORS.index(name) for name in pipeline.concepts]]
    dim = module.config.noise_dim
    correlations = {
        concept: float(abs(np.corrcoef(values[:, node * dim], factors[:, node])[0, 1]))
        for node, concept in enumerate(pipeline.concepts)
    }
    generator = torch.Generator().manual_seed(0)
    distances = {}
    for names in COMPOSITIONS:
        mask = torch.tensor([[float(name in names) for name in pipeline.concepts]]).expand(n, -1)
        noise = torch.randn(n, *module.noise_shape, generator=generator)
        sampled = module.concept_values(noise.to(module.device), mask.to(module.device)).flatten(1).cpu().numpy()
        _, real = infer_nodes(pipeline, quad.generate(names, n, _PAIRS_SEED).images)
        a, b = (x.astype(float) / values.std(axis=0) for x in (sampled, real))
        distances["+".join(names)] = float(ot.sliced_wasserstein_distance(a, b, n_projections=_PROJECTIONS, seed=0))
    mean = float(np.mean(list(distances.values())))
    return {"correlations": correlations, "graph": measure_graph(module), "pairs": distances, "pairs_mean": mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images_per_context", type=int, default=1000)
    parser.add_argument("--n", type=int, default=500, help="Held-out images of each composition.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    runs = json.loads(args.output.read_text()) if args.output.exists() else []
    options = {"images_per_context": args.images_per_context, "n": args.n}
    with tempfile.TemporaryDirectory() as folder:
        data = quad.write_folders(Path(folder) / "data", n=args.images_per_context, seed=0)
        for seed in args.seeds:
            pipeline, metrics = learn(data, seed, Path(folder) / "cache")
            metrics |= measure(pipeline, args.n)
            made_with = {"seed": seed, "options": options, "commit": commit(), "machine": machine()}
            runs.append(made_with | metrics)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(runs, indent=1) + "\n")
            print(
                f"seed {seed}: {metrics['seconds']:.0f} s, AUROC {metrics['graph']['auroc']:.3f},"
                f" correlation {np.mean(list(metrics['correlations'].values())):.3f},"
                f" pairs {metrics['pairs_mean']:.3f}"
            )


if __name__ == "__main__":
    main()
