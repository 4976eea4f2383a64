"""`diffusers-ctx evaluate`: measures an adapter on held-out images, by way of `accelerate launch`."""

from __future__ import annotations

from typing import Any

import click

from .launching import PASSED_ON, check_flags, launch, launcher_flags_option, list_flags_option
from .parameters import Adapter


def _parse(arguments: list[str]) -> Any:
    from ..evaluation import parse_evaluation_arguments

    return parse_evaluation_arguments("Measures a context adapter on held-out images.", arguments)


@click.command(
    context_settings=PASSED_ON,
    epilog="""\b
Examples:
  diffusers-ctx evaluate weather-context held-out --output_dir results
  diffusers-ctx evaluate weather-context held-out --max_samples 200 --num_inference_steps 25

\b
Flags that matter most (--list_flags prints all, docs/evaluation.md says more):
  --output_dir                      folder for results, pictures and samples
  --pretrained_model_name_or_path   base model, if the adapter does not say enough
  --max_samples                     samples per context, at most
  --num_inference_steps             denoising steps
  --num_counterfactuals             observational images to make counterfactuals of""",
)
@launcher_flags_option
@list_flags_option(_parse)
@click.argument("adapter", type=Adapter(), metavar="ADAPTER")
@click.argument("data", metavar="DATA")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="FLAGS...")
@click.pass_context
def evaluate(ctx: click.Context, adapter: str, data: str, flags: tuple[str, ...], launcher_flags: str) -> None:
    """Measure an adapter on held-out images.

    DATA has one folder of held-out images per context, and perhaps compositions, such as night+snow. Images are
    written as they are made: the same command, given again, continues where it stopped.
    """
    if adapter.startswith("-") or data.startswith("-"):
        raise click.UsageError("Give ADAPTER and DATA before the flags.", ctx)
    from ..evaluation import EvaluationConfig

    arguments = [adapter, data, *flags]
    check_flags(ctx, _parse, arguments, [EvaluationConfig])
    launch("diffusers_ctx.evaluation", arguments, launcher_flags)
