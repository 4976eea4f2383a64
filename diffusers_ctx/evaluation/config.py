"""Options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def _option(default: Any, help: str, at_least: int | None = None) -> Any:
    return field(default=default, metadata={"help": help, "at_least": at_least})


@dataclass
class EvaluationConfig:
    """Options of an evaluation; each one's help says what it is.

    Raises:
        ValueError: if an option is out of range.
    """

    output_dir: str = _option("results", "Folder for the results, the pictures and the samples.")
    pretrained_model_name_or_path: str | None = _option(
        None, "Folder or Hub id of the base model; by default the one that the adapter names."
    )
    revision: str | None = _option(None, "Branch, tag or commit of the base model on the Hub.")
    variant: str | None = _option(None, "Variant of the base model's files, such as fp16.")
    posterior_encoder_model: str | None = _option(
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
    batch_size: int = _option(16, "Images that each process makes at once.", at_least=1)
    feature_extractor: str | None = _option(
        None, "Folder or Hub id of a CLIP model for the kernel distance; by default the latents of the base's VAE."
    )
    seed: int = _option(0, "Seed of everything random.")
    cache_dir: str | None = _option(None, "Folder for downloads.")

    def __post_init__(self):
        for option in fields(self):
            value, least = getattr(self, option.name), option.metadata["at_least"]
            if None not in (value, least) and value < least:
                raise ValueError(f"`{option.name}` is {value}; it must be {least} or more.")
