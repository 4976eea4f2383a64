from .captions import CaptionLikelihood
from .causal import ReducedForm, Structural
from .interventions import Interventions, intervention_mask
from .module import ContextModule, inverse_mechanisms, log_standard_normal
from .posterior import GaussianPosterior


__all__ = [
    "CaptionLikelihood",
    "ContextModule",
    "GaussianPosterior",
    "Interventions",
    "ReducedForm",
    "Structural",
    "intervention_mask",
    "inverse_mechanisms",
    "log_standard_normal",
]
