"""The noise schedule that the backbone learns with, where it is not the base model's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...adapter import backbone_of_pipeline
from ...pipelines import CompositionMixin
from ..config import ModelConfig, TrainingConfig


_UNFREEZE_AFTER = 0.2  # of the steps


def schedule_options(model: ModelConfig, pipeline: CompositionMixin) -> dict[str, Any]:
    """What the noise schedule of training has other than the base model's; empty where it has the same.

    Raises:
        ValueError: if the mode leaves the UNet as it is, zero terminal SNR meets a prediction of the noise, or the
            base model's noise has no other schedules.
    """
    if not backbone_of_pipeline(pipeline).noising.is_diffusion:
        if model.prediction_type or model.rescale_betas_zero_snr:
            raise ValueError(
                "The base model is of rectified flow, whose schedule and prediction are given; leave out"
                " `prediction_type` and `rescale_betas_zero_snr`."
            )
        return {}
    scheduler = pipeline.scheduler
    prediction_type = model.prediction_type or scheduler.config.prediction_type
    options: dict[str, Any] = {}
    if prediction_type != scheduler.config.prediction_type:
        options["prediction_type"] = prediction_type
    if model.rescale_betas_zero_snr and not scheduler.config.get("rescale_betas_zero_snr"):
        # at the last timestep there is nothing but noise then: sampling has to start there (arXiv 2305.08891)
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if options and model.mode == "frozen":
        raise ValueError(
            f"A frozen UNet cannot learn another noise schedule ({', '.join(options)}); choose mode lora or full."
        )
    zero_snr = model.rescale_betas_zero_snr or scheduler.config.get("rescale_betas_zero_snr")
    if options and zero_snr and prediction_type == "epsilon":
        raise ValueError(
            "Where there is nothing but noise, a prediction of the noise says nothing: zero terminal SNR needs"
            " `--prediction_type v_prediction`."
        )
    return options


def with_unfreezing(config: TrainingConfig, schedule: dict[str, Any]) -> TrainingConfig:
    """The configuration with the time of unfreezing chosen, if it leaves that open."""
    if config.model.unfreeze_after is not None:
        return config
    # a frozen UNet cannot predict what it was not taught to
    share = 0.0 if schedule else _UNFREEZE_AFTER
    return replace(config, model=replace(config.model, unfreeze_after=share))
