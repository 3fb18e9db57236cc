"""Training tasks under Lightning."""

from .checkpoint import AtomicCheckpointIO
from .classification import ClassificationTask

__all__ = ["AtomicCheckpointIO", "ClassificationTask"]
