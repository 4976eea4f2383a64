r"""Fine-tunes a FLUX.1 with a context adapter, from images sorted by context.

    accelerate launch train_scripts/train_context_text_to_image_flux.py \
        --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \
        --train_data_dir photos --output_dir weather-context-flux \
        --mixed_precision bf16 --gradient_checkpointing --cache_latents

Images and flags are those of `train_context_text_to_image.py`. The transformer learns the velocity of a rectified
flow, at timesteps that are not shifted by the size of images, as in diffusers' own scripts; a model that is distilled
from guidance is told that there is none.
"""

from diffusers_ctx import ComposableFluxPipeline
from diffusers_ctx.training import ContextTrainer, parse_training_config


def main() -> None:
    config = parse_training_config()
    pipeline = ComposableFluxPipeline.from_pretrained(
        config.model.pretrained_model_name_or_path, **config.loading_options()
    )
    ContextTrainer(config, pipeline).train()


if __name__ == "__main__":
    main()
