"""Options of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from transformers import HfArgumentParser

from ..paths import expand_home


def _option(default: Any, help: str, at_least: int | None = None) -> Any:
    return field(default=default, metadata={"help": help, "at_least": at_least})


def _path(default: Any, help: str) -> Any:
    """An option that is or may be a path."""
    return field(default=default, metadata={"help": help, "is_path": True})


@dataclass
class EvaluationConfig:
    """Options of an evaluation; each one's help says what it is. `~` in paths is expanded.

    Raises:
        ValueError: if an option is out of range, or a path names an unknown home.
    """

    output_dir: str = _path("results", "Folder for the results, the pictures and the samples.")
    pretrained_model_name_or_path: str | None = _path(
        None, "Folder or Hub id of the base model; by default the one that the adapter names."
    )
    revision: str | None = _option(None, "Branch, tag or commit of the base model on the Hub.")
    variant: str | None = _option(None, "Variant of the base model's files, such as fp16.")
    posterior_encoder_model: str | None = _path(
        None, "Folder or Hub id of the CLIP model of the adapter's posterior; by default the one that it names."
    )
    caption_column: str = _option("text", "The column of captions in metadata files; captions are the prompts.")
    skip_unreadable: bool = _option(False, "Leave out images that cannot be read, instead of stopping.")
    max_samples: int | None = _option(None, "Samples per context, at most; by default half its images.", at_least=2)
    num_counterfactuals: int = _option(
        32, "Observational images to make counterfactuals of; 0 leaves them out.", at_least=0
    )
    num_inference_steps: int = _option(50, "Denoising steps.", at_least=1)
    guidance_scale: float = _option(
        1.0, "Classifier-free guidance of the samples; 1 samples the model's own distribution."
    )
    match_prompt: bool = _option(False, "Draw exogenous noise that fits the captions, as pipelines do by default.")
    batch_size: int = _option(16, "Images that each process makes at once.", at_least=1)
    feature_extractor: str | None = _path(
        None, "Folder or Hub id of a CLIP model for the kernel distance; by default the latents of the base's VAE."
    )
    seed: int = _option(0, "Seed of everything random.")
    cache_dir: str | None = _path(None, "Folder for downloads.")

    def __post_init__(self):
        for option in fields(self):
            value, least = getattr(self, option.name), option.metadata.get("at_least")
            if option.metadata.get("is_path") and value is not None:
                setattr(self, option.name, expand_home(value))
            if None not in (value, least) and value < least:
                raise ValueError(f"`{option.name}` is {value}; it must be {least} or more.")


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
    parser = _Parser(EvaluationConfig, description=description)
    parser.add_argument("adapter", help="Folder or Hub id of the context adapter.")
    parser.add_argument("data", help="Folder with one sub-folder of held-out images per context.")
    config, others = parser.parse_args_into_dataclasses(arguments)
    return EvaluationArguments(config, others.adapter, others.data)


class _Parser(HfArgumentParser):
    """Leaves out what a dataclass sees to itself."""

    def add_argument(self, *names: str, at_least: int | None = None, is_path: bool = False, **options: Any) -> Any:
        return super().add_argument(*names, **options)
