"""Fine-tunes a Stable Diffusion 3 or 3.5 with a context adapter, from images sorted by context.

    accelerate launch train_scripts/train_context_text_to_image_sd3.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium \
        --train_data_dir photos --output_dir weather-context-sd3 \
        --timestep_sampling logit_normal --mixed_precision bf16 --gradient_checkpointing --cache_latents

Images and flags are those of `train_context_text_to_image.py`. The transformer learns the velocity of a rectified
flow, at timesteps that are shifted as its scheduler says; `logit_normal` is how Stable Diffusion 3 drew them.
"""

from diffusers_ctx import ComposableSD3Pipeline
from diffusers_ctx.training import ContextTrainer, parse_training_config


def main() -> None:
    config = parse_training_config()
    pipeline = ComposableSD3Pipeline.from_pretrained(
        config.model.pretrained_model_name_or_path, **config.loading_options()
    )
    ContextTrainer(config, pipeline).train()


if __name__ == "__main__":
    main()
