"""`diffusers-ctx export`: an adapter and its base model in one folder, or the adapter in half precision."""

from __future__ import annotations

from pathlib import Path

import click

from .loading import adapter_argument, base_option, dtype_option
from .parameters import LocalPath


@click.command(
    epilog="""\b
Examples:
  diffusers-ctx export quad --output_dir quad-pipeline
  diffusers-ctx export weather-context --output_dir weather-pipeline --dtype float16
  diffusers-ctx export weather-context --output_dir weather-fp16 --dtype float16 --adapter_only"""
)
@adapter_argument
@click.option("--output_dir", type=LocalPath(), required=True, metavar="FOLDER", help="Folder to write to.")
@click.option("--adapter_only", is_flag=True, help="Leave the base model out: copy the adapter in this precision.")
@base_option
@dtype_option
def export(adapter: str, output_dir: Path, adapter_only: bool, base: str | None, dtype: str) -> None:
    """Write a pipeline with its adapter to one folder.

    ComposablePipeline.from_pretrained(FOLDER) loads both, without anything else; for Stable Diffusion XL, it is
    ComposableXLPipeline, and for Stable Diffusion 3, ComposableSD3Pipeline. Stock diffusers loads the plain base model
    from it. Prints the folder.
    """
    if adapter_only and base is not None:
        raise click.UsageError("--adapter_only takes no base model.")
    import torch

    from ..adapter import copy_adapter, copy_what_was_trained
    from ..adapter_format import ADAPTER_FOLDER
    from ..hub import resolve_adapter_folder
    from ..pipelines.adapted import load_adapted_pipeline

    folder = resolve_adapter_folder(adapter)
    if adapter_only:
        copy_adapter(folder, output_dir, getattr(torch, dtype))
    else:
        if folder.resolve() == (output_dir / ADAPTER_FOLDER).resolve():
            raise ValueError(f"{output_dir} holds the adapter itself; give another folder for the pipeline.")
        pipeline = load_adapted_pipeline(adapter, base, dtype=getattr(torch, dtype), safety_checker=True).pipeline
        pipeline.save_pretrained(output_dir, context_adapter=True)  # type: ignore[attr-defined]
        copy_what_was_trained(folder, output_dir / ADAPTER_FOLDER)
    click.echo(output_dir)
