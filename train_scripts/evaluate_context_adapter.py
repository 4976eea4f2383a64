"""Measures a context adapter on held-out images: its contexts, compositions and counterfactuals.

    accelerate launch train_scripts/evaluate_context_adapter.py weather-context held-out --output_dir results

`held-out` has a sub-folder of images per context as in training, and may have compositions, such as `night+snow`.
Half of each context's images are compared with as many samples; the other half gives the real-vs-real baseline.
Images are written as they are made: the same command, given again, continues where it stopped.
"""

import torch
from accelerate import Accelerator

from diffusers_ctx.evaluation import Evaluator, parse_evaluation_arguments
from diffusers_ctx.pipelines.adapted import load_adapted_pipeline


def main() -> None:
    config, adapter, data = parse_evaluation_arguments(__doc__.splitlines()[0])
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
