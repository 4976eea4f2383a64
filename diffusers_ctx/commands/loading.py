"""Loads an adapter with its base model, for the commands that draw images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from .parameters import Adapter, LocalPath


DTYPES = ("float32", "float16", "bfloat16")

adapter_argument = click.argument("adapter", type=Adapter(), metavar="ADAPTER")
base_option = click.option(
    "--pretrained_model_name_or_path",
    "base",
    metavar="BASE",
    help="Folder or Hub id of the base model, if the adapter does not say enough.",
)
dtype_option = click.option("--dtype", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True)
output_dir_option = click.option(
    "--output_dir", type=LocalPath(), default="samples", show_default=True, help="Folder for the images."
)


def known_interventions(adapter: str, contexts: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Strengths by concept of each context, none for the observational one, before gigabytes are loaded.

    Raises:
        BadParameter: if one intervenes on a concept that the adapter does not know.
        AdapterError: if there is no such adapter.
    """
    from ..adapter_format import read_adapter_config
    from ..context.names import normal_name
    from ..hub import resolve_adapter_folder

    config = read_adapter_config(resolve_adapter_folder(adapter))
    named = [{normal_name(name): strength for name, strength in context.items()} for context in contexts]
    interventions = [{} if set(context) == {config["obs_context"]} else context for context in named]
    if unknown := sorted({name for context in interventions for name in context} - set(config["concepts"])):
        hint = " Join concepts with '+', not ','." if any("," in name for name in unknown) else ""
        raise click.BadParameter(
            f"the adapter does not know {', '.join(unknown)}; its concepts are {', '.join(config['concepts'])}.{hint}"
        )
    return interventions


def load_pipeline(adapter: str, base: str | None, dtype: str) -> Any:
    """A pipeline with the adapter, on a GPU if there is one.

    Args:
        adapter: its folder or Hub id.
        base: folder or Hub id of the base model; by default the one that the adapter names.
        dtype: name of the precision.

    Raises:
        AdapterError: if there is no such adapter, or it does not fit the base model.
        ValueError: if no base model is given and the adapter does not say enough to load one.
    """
    import torch

    from ..pipelines.adapted import load_adapted_pipeline

    pipeline = load_adapted_pipeline(adapter, base, dtype=getattr(torch, dtype)).pipeline
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[attr-defined]
