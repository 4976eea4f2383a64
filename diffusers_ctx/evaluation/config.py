"""Options of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..options import OptionGroup, OptionParser, option, path_option


@dataclass
class EvaluationConfig(OptionGroup):
    """Options of an evaluation; each one's help says what it is."""

    output_dir: str = path_option("results", "Folder for the results, the pictures and the samples.")
    pretrained_model_name_or_path: str | None = path_option(
        None, "Folder or Hub id of the base model; by default the one that the adapter names."
    )
    revision: str | None = option(None, "Branch, tag or commit of the base model on the Hub.")
    variant: str | None = option(None, "Variant of the base model's files, such as fp16.")
    posterior_encoder_model: str | None = path_option(
        None, "Folder or Hub id of the CLIP model of the adapter's posterior; by default the one that it names."
    )
    caption_column: str = option("text", "The column of captions in metadata files; captions are the prompts.")
    skip_unreadable: bool = option(False, "Leave out images that cannot be read, instead of stopping.")
    max_samples: int | None = option(None, "Samples per context, at most; by default half its images.", at_least=2)
    num_counterfactuals: int = option(
        32, "Observational images to make counterfactuals of; 0 leaves them out.", at_least=0
    )
    num_inference_steps: int = option(50, "Denoising steps.", at_least=1)
    guidance_scale: float = option(
        1.0, "Classifier-free guidance of the samples; 1 samples the model's own distribution."
    )
    match_prompt: bool = option(False, "Draw exogenous noise that fits the captions, as pipelines do by default.")
    batch_size: int = option(16, "Images that each process makes at once.", at_least=1)
    feature_extractor: str | None = path_option(
        None, "Folder or Hub id of a CLIP model for the kernel distance; by default the latents of the base's VAE."
    )
    seed: int = option(0, "Seed of everything random.")
    cache_dir: str | None = path_option(None, "Folder for downloads.")


class EvaluationArguments(NamedTuple):
    """What the command line asks for: options, the adapter and the folder of held-out images."""

    config: EvaluationConfig
    adapter: str
    data: str


def parse_evaluation_arguments(description: str, arguments: Sequence[str] | None = None) -> EvaluationArguments:
    """Reads the command line.

    Args:
        description: what `--help` says of the program.
        arguments: the command line; by default that of this process.
    """
    parser = OptionParser(EvaluationConfig, description=description)
    parser.add_argument("adapter", help="Folder or Hub id of the context adapter.")
    parser.add_argument("data", help="Folder with one sub-folder of held-out images per context.")
    config, others = parser.parse_args_into_dataclasses(arguments)
    return EvaluationArguments(config, others.adapter, others.data)
