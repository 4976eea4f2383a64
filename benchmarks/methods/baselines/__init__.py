"""Baselines: LoRAs, and the ways of composing them."""

from .composable_diffusion import ComposableDiffusion
from .concept_sliders import ConceptSliders
from .lora_per_context import LoraDifference, LoraPerContext
from .mean_difference import MeanDifference
from .prompt_lora import PromptLora


__all__ = ["ComposableDiffusion", "ConceptSliders", "LoraDifference", "LoraPerContext", "MeanDifference", "PromptLora"]
