from .checks import check_base_model
from .config import TrainingConfig, parse_training_config
from .trainer import ContextTrainer
from .validation import draw_grid, sample_rows


__all__ = ["ContextTrainer", "TrainingConfig", "check_base_model", "draw_grid", "parse_training_config", "sample_rows"]
