"""Images in contexts: folders and datasets, the order of training, and the synthetic benchmark quad."""

from . import quad
from .context_dataset import load_context_dataset
from .contexts import concepts_of, context_mask, interventions_of
from .sampler import ContextBalancedSampler


__all__ = [
    "ContextBalancedSampler",
    "concepts_of",
    "context_mask",
    "interventions_of",
    "load_context_dataset",
    "quad",
]
