"""`diffusers-ctx counterfactual`: what given images would have been."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .loading import adapter_argument, base_option, dtype_option, known_interventions, load_pipeline, output_dir_option
from .parameters import Context, ExistingPath, named


if TYPE_CHECKING:
    from PIL.Image import Image


@click.command(
    epilog="""\b
Examples:
  diffusers-ctx counterfactual weather-context street.jpg --interventions snow
  diffusers-ctx counterfactual weather-context *.jpg --factual_interventions night --interventions night+snow"""
)
@adapter_argument
@click.argument("images", type=ExistingPath(), nargs=-1, required=True, metavar="IMAGE...")
@click.option("--interventions", type=Context(), required=True, metavar="CONTEXT", help="Of the counterfactual.")
@click.option(
    "--factual_interventions", type=Context(), metavar="CONTEXT", help="Those under which the images arose, if any."
)
@click.option("--prompt", default="", help="What the images show.")
@click.option("--num_inference_steps", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--batch_size", type=click.IntRange(min=1), default=4, show_default=True, help="Images at once.")
@base_option
@dtype_option
@output_dir_option
def counterfactual(
    adapter: str,
    images: tuple[Path, ...],
    interventions: dict[str, float],
    factual_interventions: dict[str, float] | None,
    prompt: str,
    num_inference_steps: int,
    batch_size: int,
    base: str | None,
    dtype: str,
    output_dir: Path,
) -> None:
    """Draw what images would have been under other interventions.

    Images are resized and cropped to the size that the adapter was trained on. Writes the counterfactual of each,
    and differences.png with all of them beside the images. Prints the names of the files.
    """
    stems = [path.stem for path in images]
    if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise click.UsageError(
            f"Several images are called {', '.join(repeated)}, and so would be their counterfactuals."
        )
    from ..plot.libraries import require

    require("matplotlib")  # before gigabytes are loaded
    action, factual = known_interventions(adapter, [interventions, factual_interventions or {}])
    whole = [_read(path) for path in images]
    pipeline = load_pipeline(adapter, base, dtype)
    from ..data.decoding import square_crop
    from ..plot import counterfactuals

    resolution = pipeline.context_module.config.posterior_sample_size * pipeline.vae_scale_factor
    pictures = [square_crop(picture, resolution) for picture in whole]
    batches = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
    arguments = (action, factual, prompt, num_inference_steps)
    made = [picture for batch in batches for picture in pipeline.counterfactual(batch, *arguments).images]
    name = named(action) or pipeline.context_module.config.obs_context
    output_dir.mkdir(parents=True, exist_ok=True)
    files = [output_dir / f"{stem}-{name}.png" for stem in stems]
    for file, picture in zip(files, made):
        picture.save(file)
        click.echo(file)
    counterfactuals(pictures, made, stems, f"do({name})" if action else name).savefig(
        output_dir / "differences.png", dpi=150
    )
    click.echo(output_dir / "differences.png")


def _read(path: Path) -> Image:
    from ..data.encoded_images import read_image

    try:
        return read_image({"path": str(path), "bytes": None})[0]
    except (ValueError, OSError) as error:
        raise click.UsageError(f"{path} cannot be read: {error}.") from error
