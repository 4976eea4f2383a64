"""Trains a context adapter: `accelerate launch -m diffusers_ctx.training`, with the flags of the training scripts.

It does what they do, wherever the library is installed, and for every family of base models.
"""

from typing import Any

from diffusers import DiffusionPipeline

from ..paths import local_or_hub
from ..pipelines import ComposableFluxPipeline, ComposablePipeline, ComposableSD3Pipeline, ComposableXLPipeline
from . import ContextTrainer, parse_training_config


def main() -> None:
    config = parse_training_config()
    base, options = local_or_hub(config.model.pretrained_model_name_or_path), config.loading_options()
    source = {name: options[name] for name in ("revision", "cache_dir")}
    kind = _pipeline_class(DiffusionPipeline.load_config(base, **source))
    checker = {"safety_checker": None, "requires_safety_checker": False} if kind is ComposablePipeline else {}
    ContextTrainer(config, kind.from_pretrained(base, **checker, **options)).train()


def _pipeline_class(model_index: dict[str, Any]) -> Any:
    """The pipeline that trains a checkpoint with this `model_index.json`.

    Raises:
        ValueError: if its family is not known.
    """
    name = model_index["_class_name"]
    if "StableDiffusion3" in name:
        return ComposableSD3Pipeline
    if name == "FluxPipeline":  # and not those of inpainting, control or editing, which take other channels
        return ComposableFluxPipeline
    if "unet" not in model_index:
        raise ValueError(
            f"The checkpoint is for a {name}, and context adapters are for Stable Diffusion 1, 2, XL, 3 and 3.5 and"
            " for FLUX.1; choose one of these."
        )
    return ComposableXLPipeline if "XL" in name else ComposablePipeline


if __name__ == "__main__":
    main()
