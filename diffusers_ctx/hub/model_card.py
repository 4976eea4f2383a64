"""An adapter's model card, rendered from its config, its metrics and the record of its training."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined, Template

from ..adapter_format import CARD_NAME
from ..embedded import called_base
from ..paths import local_path


_MARKER = (
    "<!-- Written by diffusers_ctx and overwritten when it saves again; delete this line to keep your own text. -->"
)
_USAGE = re.compile(r"^## How to use it\n.*?^```$", re.DOTALL | re.MULTILINE)
_RESULTS = {"dataset", "metrics", "references"}
_TRAINING = {"command", "seed", "commit", "machine", "versions", "hyperparameters"}
_PIPELINES = {"SD3Transformer2DModel": "ComposableSD3Pipeline", "FluxTransformer2DModel": "ComposableFluxPipeline"}
_ACCESS_TOKEN = re.compile(r"\bhf_\w{20,}")


def render_model_card(
    config: Mapping[str, Any],
    *,
    repo_id: str | None = None,
    results: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    pictures: Sequence[str] | None = None,
    license: str | None = None,
    within_pipeline: bool = False,
) -> ModelCard:
    """The model card of the adapter with this config.

    The card is public: access tokens are left out, and of absolute paths only the last part is shown.

    Args:
        config: the adapter's config.
        repo_id: the repository of the adapter.
        results: `dataset` (a line that describes the images), `metrics` (a mapping from metric to context to value)
            and `references` (likewise, but not of the adapter, such as real images against real images; they are in
            the table and not in the card's metadata).
        training: any of `command` (a list of arguments), `seed`, `commit`, `machine`, `versions` and
            `hyperparameters` (mappings).
        pictures: file names of the pictures to show, relative to the adapter's folder.
        license: the adapter's license in the Hub's spelling, such as `apache-2.0`.
        within_pipeline: whether the adapter's folder is one of its pipeline's, whose `from_pretrained` loads both.

    Raises:
        ValueError: if `results` or `training` has an unknown key, or if `results` has no `dataset`.
    """
    results, training = results or {}, training or {}
    _refuse_unknown("results", results, _RESULTS)
    _refuse_unknown("training", training, _TRAINING)
    if results and "dataset" not in results:
        raise ValueError("`results` has no `dataset`: name the images that the metrics were computed on.")

    base_model = _hub_id(config.get("base_model_name_or_path"))
    concepts = config["concepts"]
    adapter_argument = repo_id or "path/to/this/folder"
    base_argument = base_model or "path/to/the/checkpoint"
    if within_pipeline:
        base_argument = "path/to/the/pipeline"
    elif config["mode"] == "full":  # the adapter is saved in the folder of its own pipeline
        base_argument = adapter_argument
    is_embedded = _is_embedded(config) and config["mode"] != "full" and not within_pipeline
    columns = {**results.get("metrics", {}), **results.get("references", {})}
    content = _template().render(
        metadata=_metadata(config, base_model, repo_id, results, license).to_yaml(),
        marker=_MARKER,
        title=repo_id or "Context adapter: " + ", ".join(concepts),
        base=_base_in_words(base_model, config),
        embedded_base=config["base_model_name_or_path"] if is_embedded else None,
        base_argument=base_argument,
        adapter_argument=adapter_argument,
        within_pipeline=within_pipeline,
        obs_context=config["obs_context"],
        concepts=concepts,
        composed=concepts[:2],
        pipeline=pipeline_name(config),
        softer={concepts[0]: 0.5},
        mode=config["mode"],
        injection=config["injection"],
        license=license,
        pictures=pictures or [],
        command=training.get("command"),
        details=_details(training),
        dataset=results.get("dataset"),
        columns=columns,
        table=_table(columns),
    )
    return ModelCard(content)


def save_model_card(card: ModelCard, folder: str | os.PathLike) -> Path:
    """Writes `card` as the README of `folder`, unless its author has replaced the one that was there."""
    path = local_path(folder) / CARD_NAME
    if not path.exists() or _MARKER in path.read_text(encoding="utf-8"):
        card.save(path)
    return path


def with_usage_of(card: str, other: str) -> str:
    """A card's text, with the usage that another one shows; a card that an author has rewritten stays as it is."""
    usage = _USAGE.search(other)
    if usage is None or _MARKER not in card:
        return card
    return _USAGE.sub(lambda _: usage[0], card, count=1)


def pipeline_name(config: Mapping[str, Any]) -> str:
    """Name of the pipeline class, in diffusers_ctx, for the adapter with this config."""
    base = config["base"]
    if (architecture := base.get("architecture")) in _PIPELINES:
        return _PIPELINES[architecture]
    return "ComposableXLPipeline" if base.get("addition_embed_type") == "text_time" else "ComposablePipeline"


def _refuse_unknown(name: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"`{name}` has unknown keys {unknown}; the card shows {sorted(known)}.")


def _hub_id(name: str | None) -> str | None:
    """`name` if it can be a model on the Hub; the Hub refuses local paths, and they are private."""
    if not name or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _is_embedded(config: Mapping[str, Any]) -> bool:
    return called_base(config.get("base_model_name_or_path")) is not None


def _base_in_words(hub_id: str | None, config: Mapping[str, Any]) -> str:
    if hub_id:
        return f"[{hub_id}](https://huggingface.co/{hub_id})"
    return "the small Stable Diffusion that comes with diffusers_ctx" if _is_embedded(config) else "a local checkpoint"


def _metadata(
    config: Mapping[str, Any],
    base_model: str | None,
    repo_id: str | None,
    results: Mapping[str, Any],
    license: str | None,
) -> ModelCardData:
    evaluation = list(_evaluation(results))
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        tags=["diffusers", "stable-diffusion", "context-adapter", "causal"] + ["lora"] * (config["mode"] == "lora"),
        model_name=(repo_id or "context-adapter").split("/")[-1] if evaluation else None,
        eval_results=evaluation or None,
    )


def _evaluation(results: Mapping[str, Any]) -> Iterator[EvalResult]:
    for metric, values in results.get("metrics", {}).items():
        for context, value in values.items():
            if math.isfinite(value):  # the Hub's metadata has no NaN or infinity
                yield EvalResult(
                    task_type="text-to-image",
                    dataset_type=_slug(results["dataset"]),
                    dataset_name=results["dataset"],
                    metric_type=_slug(metric),
                    metric_name=f"{metric}, {context}",
                    metric_value=float(value),
                )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _details(training: Mapping[str, Any]) -> list[tuple[str, Any]]:
    described = {name: training.get(name) for name in ("seed", "commit", "machine")}
    described |= {**training.get("versions", {}), **training.get("hyperparameters", {})}
    return [(name, value) for name, value in described.items() if value is not None and not _is_secret(name)]


def _table(columns: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """One row per context: its name, then its value of every metric."""
    contexts = dict.fromkeys(context for values in columns.values() for context in values)
    return [
        [context, *(f"{values[context]:.4g}" if context in values else "-" for values in columns.values())]
        for context in contexts
    ]


def _template() -> Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"cell": _cell, "command": _command, "quoted": _quoted, "shown": _shown}
    source = resources.files("diffusers_ctx.model_cards").joinpath("context_adapter.md")
    return environment.from_string(source.read_text(encoding="utf-8"))


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(value: Any) -> str:
    return _shown(value).replace("|", "\\|").replace("\n", " ")


def _command(arguments: Sequence[str]) -> str:
    """The command line as the card shows it, without access tokens and local folders."""
    shown = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if not _is_secret(flag):
            shown.append(f"{flag}={_shown(value)}" if equals else _shown(argument))
        elif not equals:
            next(remaining, None)
    return shlex.join(shown)


def is_public(options: Mapping[str, Any]) -> bool:
    """Whether the options may be published: none is an access token or an absolute path."""
    return all(
        value is None or (not _is_secret(name) and all(_shown(text) == str(text) for text in _texts(value)))
        for name, value in options.items()
    )


def _texts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _is_secret(name: str) -> bool:
    return name.lower().endswith("token")


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    text = str(value)
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
        return f".../{PureWindowsPath(text).name}"
    return _ACCESS_TOKEN.sub("hf_...", text)
