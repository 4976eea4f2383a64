"""`diffusers-ctx demo`: the whole method on generated images."""

from __future__ import annotations

from pathlib import Path

import click

from .parameters import LocalPath


@click.command(
    epilog="""\b
Examples:
  diffusers-ctx demo
  diffusers-ctx demo --output_dir runs/short --images_per_context 100 --concept_steps 50 --max_train_steps 20"""
)
@click.option("--output_dir", type=LocalPath(), default="runs/demo", show_default=True, help="Folder for all files.")
@click.option("--concept_steps", type=click.IntRange(min=2), default=700, show_default=True)
@click.option("--max_train_steps", type=click.IntRange(min=1), default=250, show_default=True)
@click.option("--images_per_context", type=click.IntRange(min=1), default=600, show_default=True)
@click.option(
    "--samples_per_context",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Images that each distance is measured on.",
)
@click.option("--num_inference_steps", type=click.IntRange(min=1), default=12, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def demo(
    output_dir: Path,
    concept_steps: int,
    max_train_steps: int,
    images_per_context: int,
    samples_per_context: int,
    num_inference_steps: int,
    seed: int,
) -> None:
    """Draw, train and measure on generated images.

    Draws samples of the adapter that comes with the library, within a minute. Then writes quad images into one folder
    per context, trains an adapter on the shipped Stable Diffusion with them, loads it as a user would, and compares
    its samples with real images from held-out seeds, also under combinations of interventions that were never in the
    training data. Takes minutes of a CPU.
    """
    from .quad_demo import QuadDemo

    QuadDemo(
        output_dir,
        concept_steps,
        max_train_steps,
        images_per_context,
        samples_per_context,
        num_inference_steps,
        seed,
    ).run()
