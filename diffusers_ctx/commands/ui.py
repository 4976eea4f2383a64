"""`diffusers-ctx ui`: a page to play with an adapter."""

from __future__ import annotations

import click

from .loading import base_option, dtype_option


@click.command(
    epilog="""\b
Examples:
  diffusers-ctx ui
  diffusers-ctx ui weather-context --port 8000
  diffusers-ctx ui someone/weather-context --dtype float16"""
)
@click.argument("adapter", default="quad", metavar="[ADAPTER]")
@base_option
@dtype_option
@click.option("--host", metavar="ADDRESS", help="Address to listen at; this machine alone by default.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen at; the first free one from 7860 on.")
def ui(adapter: str, base: str | None, dtype: str, host: str | None, port: int | None) -> None:
    """Open a page to play with an adapter.

    ADAPTER is a folder, a Hub id, or quad, the one that comes with the library and is there by default; the page lets
    you choose others. Prints the address to open in a browser.
    """
    from ..ui import build_page, launch

    click.echo(f"Loading {adapter}, and drawing the first image.")
    import torch

    launch(build_page(adapter, base, getattr(torch, dtype)), host, port)
