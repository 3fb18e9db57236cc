"""Training tasks under Lightning."""

from .checkpoint import AtomicCheckpointIO
from .classification import ClassificationTask, no_weight_decay_names

__all__ = ["AtomicCheckpointIO", "ClassificationTask", "no_weight_decay_names"]
