"""Metrics, each a pure function on arrays."""

from .sliced_wasserstein import debiased, sliced_wasserstein_distance


__all__ = ["debiased", "sliced_wasserstein_distance"]
