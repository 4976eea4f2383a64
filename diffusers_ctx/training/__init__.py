from .config import TrainingConfig, parse_training_config
from .trainer import ContextTrainer
from .validation import draw_grid, sample_rows


__all__ = ["ContextTrainer", "TrainingConfig", "draw_grid", "parse_training_config", "sample_rows"]
