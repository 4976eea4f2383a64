"""Pictures of images, graphs, metrics and noise, each a matplotlib figure: `figure.savefig("grid.png")`.

Only `draw_grid` makes a plain picture, pixel by pixel, and does without matplotlib.
"""

from .attention import attention_maps
from .counterfactuals import counterfactuals
from .curves import training_curves
from .graph import causal_graph, effects
from .grid import image_grid, strength_strip
from .heat_maps import edge_strengths, heat_maps, interference
from .noise import exogenous_noise
from .pixels import draw_grid
from .training_log import TrainingLog, read_training_log


__all__ = [
    "TrainingLog",
    "attention_maps",
    "causal_graph",
    "counterfactuals",
    "draw_grid",
    "edge_strengths",
    "effects",
    "exogenous_noise",
    "heat_maps",
    "image_grid",
    "interference",
    "read_training_log",
    "strength_strip",
    "training_curves",
]
