"""`diffusers-ctx sample`: images under interventions."""

from __future__ import annotations

from pathlib import Path

import click

from .loading import adapter_argument, base_option, dtype_option, known_interventions, load_pipeline, output_dir_option
from .parameters import Context, named


@click.command(
    epilog="""\b
Examples:
  diffusers-ctx sample quad --prompt "a picture of a square" --interventions quad1+quad4 --guidance_scale 1
  diffusers-ctx sample weather-context --prompt "a street" --interventions obs --interventions night+snow
  diffusers-ctx sample weather-context --prompt "a street" --interventions night=0.5 --num_images 8 --seed 7

quad is the adapter that comes with the library."""
)
@adapter_argument
@click.option("--prompt", default="", help="What the images show.")
@click.option(
    "--interventions",
    "contexts",
    type=Context(),
    multiple=True,
    metavar="CONTEXT",
    help="Concepts, such as night, night+snow or night=0.5+snow; none by default. May be given several times: the same"
    " noise is drawn under each.",
)
@click.option("--num_images", type=click.IntRange(min=1), default=4, show_default=True, help="Images per context.")
@click.option("--num_inference_steps", type=click.IntRange(min=1), default=25, show_default=True)
@click.option("--guidance_scale", type=float, default=7.5, show_default=True, help="Classifier-free guidance.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first image.")
@base_option
@dtype_option
@output_dir_option
def sample(
    adapter: str,
    prompt: str,
    contexts: tuple[dict[str, float], ...],
    num_images: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    base: str | None,
    dtype: str,
    output_dir: Path,
) -> None:
    """Draw images with an adapter.

    Writes each image, and grid.png with a row per context. Prints the names of the files.
    """
    interventions = known_interventions(adapter, contexts) or [{}]
    pipeline = load_pipeline(adapter, base, dtype)
    from PIL import Image

    from ..evaluation.grids import sample_rows
    from ..plot import draw_grid

    rows = sample_rows(
        pipeline, interventions, [prompt] * num_images, seed, num_inference_steps, guidance_scale=guidance_scale
    )
    obs_context = pipeline.context_module.config.obs_context
    names = [named(context) or obs_context for context in interventions]
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, images in zip(names, rows):
        for index, image in enumerate(images):
            file = output_dir / f"{name}-{seed + index}.png"
            Image.fromarray(image).save(file)
            click.echo(file)
    draw_grid(rows, names).save(output_dir / "grid.png")
    click.echo(output_dir / "grid.png")
