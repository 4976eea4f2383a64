"""Fine-tuning with a context adapter."""

from .checks import check_base_model
from .config import (
    ContextConfig,
    DataConfig,
    ModelConfig,
    OptimizationConfig,
    OutputConfig,
    TrainingConfig,
    parse_training_config,
)
from .trainer import ContextTrainer


__all__ = [
    "ContextConfig",
    "ContextTrainer",
    "DataConfig",
    "ModelConfig",
    "OptimizationConfig",
    "OutputConfig",
    "TrainingConfig",
    "check_base_model",
    "parse_training_config",
]
