"""Training a context adapter on a pretrained pipeline."""

from .config import ContextConfig, DataConfig, ModelConfig, OptimizationConfig, OutputConfig, TrainingConfig
from .config_file import parse_training_config
from .trainer import ContextTrainer


__all__ = [
    "ContextConfig",
    "ContextTrainer",
    "DataConfig",
    "ModelConfig",
    "OptimizationConfig",
    "OutputConfig",
    "TrainingConfig",
    "parse_training_config",
]
