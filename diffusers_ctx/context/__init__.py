from .captions import CaptionLikelihood, embed_captions
from .causal import ReducedForm, Structural
from .interventions import Interventions, any_interventions, intervention_mask
from .module import ContextModule, inverse_mechanisms, log_standard_normal
from .posterior import GaussianPosterior, PosteriorEncoder
from .summands import Summand, summands_of


__all__ = [
    "CaptionLikelihood",
    "ContextModule",
    "GaussianPosterior",
    "Interventions",
    "PosteriorEncoder",
    "ReducedForm",
    "Structural",
    "Summand",
    "any_interventions",
    "embed_captions",
    "intervention_mask",
    "inverse_mechanisms",
    "log_standard_normal",
    "summands_of",
]
