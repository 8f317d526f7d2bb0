"""Other people's training loops: Hugging Face's Trainer, and with it TRL's."""

from mtraining.integrations.options import ContextParallelConfig
from mtraining.integrations.trainer import ContextParallelTrainer

__all__ = ["ContextParallelConfig", "ContextParallelTrainer"]
