"""Trains a context adapter: `accelerate launch -m diffusers_ctx.training`, with the flags of the training scripts.

It does what they do, wherever the library is installed, and for a Stable Diffusion as for a Stable Diffusion XL.
"""

from diffusers import DiffusionPipeline

from ..paths import local_or_hub
from ..pipelines import ComposablePipeline, ComposableXLPipeline
from . import ContextTrainer, parse_training_config


def main() -> None:
    config = parse_training_config()
    base, options = local_or_hub(config.model.pretrained_model_name_or_path), config.loading_options()
    source = {name: options[name] for name in ("revision", "cache_dir")}
    if "XL" in DiffusionPipeline.load_config(base, **source)["_class_name"]:
        pipeline = ComposableXLPipeline.from_pretrained(base, **options)
    else:
        pipeline = ComposablePipeline.from_pretrained(
            base, safety_checker=None, requires_safety_checker=False, **options
        )
    ContextTrainer(config, pipeline).train()


if __name__ == "__main__":
    main()
