"""`diffusers-ctx inspect`: what an adapter is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from .parameters import Adapter, LocalPath


_CONFIG = ("base_model_name_or_path", "concepts", "obs_context", "mode", "injection", "format_version")
_WEAKEST = 0.1  # share of the strongest edge, from which on edges are listed


@click.command(
    epilog="""\b
Examples:
  diffusers-ctx inspect quad
  diffusers-ctx inspect weather-context --graph graph.png
  diffusers-ctx inspect someone/weather-context --json"""
)
@click.argument("adapter", type=Adapter(), metavar="ADAPTER")
@click.option("--graph", type=LocalPath(), metavar="FILE", help="Draw the learned graph of the concepts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(adapter: str, graph: Path | None, as_json: bool) -> None:
    """Show an adapter's concepts, graph, sizes and metrics.

    ADAPTER is a folder, a Hub id, or quad, the one that comes with the library. All its files are checked; no base
    model is loaded.
    """
    facts = _facts(adapter)
    if graph is not None:
        _draw_graph(facts, graph)
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_in_words(facts)))


def _facts(adapter: str) -> dict[str, Any]:
    from ..adapter_format import MODULE_FOLDER, adapter_files, validate_adapter_folder
    from ..context import ContextModule
    from ..hub import resolve_adapter_folder

    folder = resolve_adapter_folder(adapter)
    config = validate_adapter_folder(folder)
    module = ContextModule.from_pretrained(folder / MODULE_FOLDER)
    files = [folder / name for name in adapter_files(config)]
    return {
        "adapter": adapter,
        **{name: config.get(name) for name in _CONFIG},
        "graph": {
            "given": module.config.graph is not None,
            "form": module.config.causal_form,
            "nodes": module.node_names,
            "strengths": module.causal.strengths().tolist(),
        },
        "nodes_without_noise": list(module.config.nodes_without_noise),
        "knows_captions": module.knows_captions,
        "posterior_encoder": module.config.posterior_encoder,
        "bytes": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
        "weights": sum(_count_weights(path) for path in files if path.suffix == ".safetensors"),
        "metrics": _metrics(folder),
    }


def _count_weights(path: Path) -> int:
    import math

    from safetensors import safe_open

    with safe_open(path, framework="numpy") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())


def _metrics(folder: Path) -> dict[str, Any]:
    """What the card's metadata say was measured."""
    from huggingface_hub import ModelCard

    from ..adapter_format import CARD_NAME

    if not (folder / CARD_NAME).is_file():
        return {}
    results = ModelCard.load(folder / CARD_NAME).data.eval_results or []
    return {
        f"{result.metric_name or result.metric_type} ({result.dataset_name})": result.metric_value
        for result in results
    }


def _in_words(facts: dict[str, Any]) -> Iterator[str]:
    yield facts["adapter"]
    rows = {
        "base": facts["base_model_name_or_path"] or "not named",
        "concepts": ", ".join(facts["concepts"]),
        "observational": facts["obs_context"],
        "mode": f"{facts['mode']}, injection {facts['injection']}, format {facts['format_version']}",
        "posterior": f"reads {facts['posterior_encoder']}",
        "captions": "learned (`match_prompt`)" if facts["knows_captions"] else "not learned",
    }
    if facts["nodes_without_noise"]:
        rows["without noise"] = ", ".join(facts["nodes_without_noise"])
    rows["size"] = f"{facts['weights']:,} weights, {sum(facts['bytes'].values()) / 1e6:.1f} MB"
    for name, text in rows.items():
        yield f"  {name:14} {text}"
    for name, size in facts["bytes"].items():
        yield f"  {'':14} {size / 1e6:10.3f} MB  {name}"
    graph = facts["graph"]
    yield f"  {'graph':14} {'given' if graph['given'] else 'learned'}, {graph['form']}; edges among the concepts:"
    edges = sorted(_edges(facts), reverse=True)
    for strength, cause, effect in edges:
        yield f"  {'':14} {strength:6.3f}  {cause} -> {effect}"
    if not edges:
        yield f"  {'':14} none"
    if facts["metrics"]:
        yield "  metrics of the card"
        for name, metric in facts["metrics"].items():
            shown = f"{metric:.4g}" if isinstance(metric, int | float) else metric
            yield f"  {'':14} {shown}  {name}"
    else:
        yield f"  {'metrics':14} none in the card's metadata"


def _edges(facts: dict[str, Any]) -> Iterator[tuple[float, str, str]]:
    """Strength, cause and effect of each edge among the concepts, but for the weakest."""
    concepts, strengths = facts["concepts"], facts["graph"]["strengths"]
    weakest = _WEAKEST * max((max(row[: len(concepts)]) for row in strengths[: len(concepts)]), default=0)
    for effect, row in zip(concepts, strengths):
        for cause, strength in zip(concepts, row):
            if strength > 0 and strength >= weakest:
                yield strength, cause, effect


def _draw_graph(facts: dict[str, Any], file: Path) -> None:
    import numpy as np

    from ..plot import causal_graph

    concepts = facts["concepts"]
    strengths = np.array(facts["graph"]["strengths"])[: len(concepts), : len(concepts)]
    file.parent.mkdir(parents=True, exist_ok=True)
    causal_graph(strengths, concepts, threshold=_WEAKEST).savefig(file, dpi=150)
