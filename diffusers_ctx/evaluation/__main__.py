"""Measures a context adapter on held-out images: `accelerate launch -m diffusers_ctx.evaluation adapter held-out`."""

import torch
from accelerate import Accelerator

from ..pipelines.adapted import load_adapted_pipeline
from . import Evaluator, parse_evaluation_arguments


def main() -> None:
    config, adapter, data = parse_evaluation_arguments(
        "Measures a context adapter on held-out images: its contexts, compositions and counterfactuals."
    )
    accelerator = Accelerator()
    pipeline, source, fingerprints = load_adapted_pipeline(
        adapter,
        config.pretrained_model_name_or_path,
        dtype={"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32),
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
    )
    pipeline.set_progress_bar_config(disable=True)
    Evaluator(config, pipeline.to(accelerator.device), data, source, fingerprints, accelerator).run()


if __name__ == "__main__":
    main()
