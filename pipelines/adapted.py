"""A context adapter on the base model that it names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

from diffusers_ctx.adapter_format import ADAPTER_FOLDER, adapter_files, public_name, read_adapter_config
from diffusers_ctx.embedded import called_base
from diffusers_ctx.fingerprint import fingerprint
from diffusers_ctx.hub import pipeline_name, resolve_adapter_folder

from .composition import CompositionMixin
from .flux import ComposableFluxPipeline
from .stable_diffusion import ComposablePipeline
from .stable_diffusion_3 import ComposableSD3Pipeline
from .stable_diffusion_xl import ComposableXLPipeline


class AdaptedPipeline(NamedTuple):
    """A pipeline with a context adapter.

    Attributes:
        pipeline: the pipeline, on the CPU.
        source: names of what was loaded: `adapter` and its `adapter_commit` on the Hub, and the base model's
            `pretrained_model_name_or_path`, `revision` and `variant`.
        fingerprints: of the adapter's files and of the base model's weights: a name does not tell whether the weights
            behind it were trained further or replaced.
    """

    pipeline: CompositionMixin
    source: dict[str, Any]
    fingerprints: dict[str, str]


def load_adapted_pipeline(
    adapter: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    safety_checker: bool = False,
) -> AdaptedPipeline:
    """Loads a context adapter with its base model, in the pipeline that runs both.

    Args:
        adapter: folder or Hub id of the adapter.
        base: folder or Hub id of the base model; by default the one that the adapter names.
        dtype: precision of all models.
        revision: branch, tag or commit of the base model on the Hub.
        variant: variant of the base model's files, such as `"fp16"`.
        cache_dir: folder for downloads.
        safety_checker: whether to load the safety checker too, if the base model has one.

    Raises:
        AdapterError: if there is no such adapter, or it does not fit the base model.
        ValueError: if no base model is given and the adapter's config does not say enough to load one.
    """
    folder = resolve_adapter_folder(adapter, cache_dir=cache_dir)
    config = read_adapter_config(folder)
    base = base or recorded_base(os.fspath(adapter), config)
    kinds = (ComposablePipeline, ComposableXLPipeline, ComposableSD3Pipeline, ComposableFluxPipeline)
    kind = {cls.__name__: cls for cls in kinds}[pipeline_name(config)]
    options = {"revision": revision, "variant": variant, "cache_dir": cache_dir}
    if kind is ComposablePipeline and not safety_checker:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    pipeline = kind.from_pretrained(base, context_adapter=False, **options)
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    source = {
        "adapter": os.fspath(adapter),
        "adapter_commit": folder.name if folder.parent.name == "snapshots" else None,
        "pretrained_model_name_or_path": public_name(os.fspath(base)),
        "revision": revision,
        "variant": variant,
    }
    adapter_paths = [folder / name for name in adapter_files(config)]
    fingerprints = {"adapter": fingerprint(*adapter_paths), "base model": fingerprint(*models)}
    pipeline.load_context_adapter(adapter, cache_dir=cache_dir)
    if any(model.dtype != dtype for model in models):  # diffusers warns of any cast
        pipeline.to(dtype)
    return AdaptedPipeline(pipeline, source, fingerprints)


def recorded_base(adapter: str, adapter_config: dict[str, Any]) -> str:
    """The base model that an adapter was trained on, where its config says enough to load it.

    Raises:
        ValueError: if it does not.
    """
    base = adapter_config["base_model_name_or_path"]
    if adapter_config["mode"] == "full":
        # its own pipeline is in the same place, or around it where both were saved together
        folder = Path(adapter)
        is_within = folder.name == ADAPTER_FOLDER and (folder.parent / DiffusionPipeline.config_name).exists()
        return str(folder.parent) if is_within else adapter
    if embedded := called_base(base):
        return embedded
    if not base or "/" not in base:
        raise ValueError(
            f"The adapter names its base model only as {base!r}; give the folder or Hub id as"
            " `pretrained_model_name_or_path`."
        )
    return base
