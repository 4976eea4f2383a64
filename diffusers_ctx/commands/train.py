"""`diffusers-ctx train`: trains an adapter, by way of `accelerate launch`."""

from __future__ import annotations

from typing import Any

import click

from .launching import PASSED_ON, check_flags, launch, launcher_flags_option, list_flags_option


def _parse(arguments: list[str]) -> Any:
    from ..training import parse_training_config

    return parse_training_config(arguments)


@click.command(
    context_settings=PASSED_ON,
    epilog="""\b
Examples:
  diffusers-ctx train --pretrained_model_name_or_path BASE --train_data_dir photos --output_dir weather-context
  diffusers-ctx train options.yaml --max_train_steps 2000
  diffusers-ctx train options.yaml --launcher_flags "--num_processes 2"

\b
Flags that most trainings need (--list_flags prints all, docs/training.md explains them):
  --pretrained_model_name_or_path   base model, a folder or Hub id
  --train_data_dir                  folder with one folder of images per context
  --resolution                      height and width of the images
  --output_dir                      folder for the adapter
  --train_batch_size                images per step
  --max_train_steps                 optimizer steps
  --mixed_precision                 no, fp16 or bf16
  --resume_from_checkpoint latest   go on with a run that was stopped""",
)
@launcher_flags_option
@list_flags_option(_parse)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[FILE] FLAGS...")
@click.pass_context
def train(ctx: click.Context, flags: tuple[str, ...], launcher_flags: str) -> None:
    """Train an adapter on a folder of contexts.

    The flags are those of train_scripts/train_context_text_to_image.py. They may stand in a YAML or JSON FILE, and
    flags after it override it. The base model may be a Stable Diffusion 1, 2, XL, 3 or 3.5.
    """
    if not flags:
        raise click.UsageError("Give the flags of the training, or a file that has them.", ctx)
    from ..training.config import GROUPS

    check_flags(ctx, _parse, flags, GROUPS)
    launch("diffusers_ctx.training", flags, launcher_flags)
