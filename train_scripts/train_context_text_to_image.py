"""Fine-tunes a Stable Diffusion with a context adapter, from images sorted by context.

    accelerate launch train_scripts/train_context_text_to_image.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_data_dir photos --output_dir weather-context

`photos` has a sub-folder of images per context: `obs`, and one for each concept, such as `night` and `snow`. `--help`
lists all flags; they may stand in a YAML or JSON file instead, and flags after the file override it.
"""

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.training import ContextTrainer, parse_training_config


def main() -> None:
    config = parse_training_config()
    pipeline = ComposablePipeline.from_pretrained(
        config.model.pretrained_model_name_or_path,
        safety_checker=None,
        requires_safety_checker=False,
        **config.loading_options(),
    )
    ContextTrainer(config, pipeline).train()


if __name__ == "__main__":
    main()
