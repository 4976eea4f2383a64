"""Metrics, each a pure function on arrays; `Evaluator` measures an adapter with them."""

from .config import EvaluationConfig, parse_evaluation_arguments
from .conformity import Conformity, composition_gap, conformity
from .counterfactual import (
    counterfactual_effectiveness,
    counterfactual_error,
    counterfactual_minimality,
)
from .disentanglement import (
    DCI,
    dci,
    mean_correlation_coefficient,
    mutual_information_gap,
    separated_attribute_predictability,
)
from .diversity import diversity, image_diversity
from .evaluator import Evaluator
from .graph_recovery import edge_auroc, structural_hamming_distance
from .interference import Spillover, interference_matrix, mean_difference, spillover
from .kernel_distance import kernel_distance
from .quad_attributes import read_attributes
from .sliced_wasserstein import bootstrap_interval, debiased, sliced_wasserstein_distance


__all__ = [
    "DCI",
    "Conformity",
    "EvaluationConfig",
    "Evaluator",
    "Spillover",
    "bootstrap_interval",
    "composition_gap",
    "conformity",
    "counterfactual_effectiveness",
    "counterfactual_error",
    "counterfactual_minimality",
    "dci",
    "debiased",
    "diversity",
    "edge_auroc",
    "image_diversity",
    "interference_matrix",
    "kernel_distance",
    "mean_correlation_coefficient",
    "mean_difference",
    "mutual_information_gap",
    "parse_evaluation_arguments",
    "read_attributes",
    "separated_attribute_predictability",
    "sliced_wasserstein_distance",
    "spillover",
    "structural_hamming_distance",
]
