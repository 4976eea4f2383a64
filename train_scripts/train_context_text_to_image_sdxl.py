"""Fine-tunes a Stable Diffusion XL with a context adapter, from images sorted by context.

    accelerate launch train_scripts/train_context_text_to_image_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --train_data_dir photos --output_dir weather-context-xl --mixed_precision bf16 --gradient_checkpointing

Images and flags are those of `train_context_text_to_image.py`. The UNet is conditioned on each image's
original size and crop, as in the training of Stable Diffusion XL.
"""

from diffusers_ctx import ComposableXLPipeline
from diffusers_ctx.training import ContextTrainer, parse_training_config


def main() -> None:
    config = parse_training_config()
    pipeline = ComposableXLPipeline.from_pretrained(
        config.model.pretrained_model_name_or_path, **config.loading_options()
    )
    ContextTrainer(config, pipeline).train()


if __name__ == "__main__":
    main()
