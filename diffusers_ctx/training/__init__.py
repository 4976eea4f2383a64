from .checks import check_base_model
from .config import TrainingConfig, parse_training_config
from .trainer import ContextTrainer


__all__ = ["ContextTrainer", "TrainingConfig", "check_base_model", "parse_training_config"]
