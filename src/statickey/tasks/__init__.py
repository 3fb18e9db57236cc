"""Training, scoring and using image classifiers under Lightning."""

from .._environment import environment
from .checkpoint import AtomicCheckpointIO
from .classification import ClassificationTask
from .display import Display, RunProgress
from .engine import (
    PREDICTIONS_FILE,
    RESULT_FILE,
    Run,
    data_module,
    new_model,
    new_trainer,
    read_data,
    score,
    train_run,
)
from .evaluate import evaluate
from .folder import locked
from .predict import Predictions, predict
from .recipe import Machine, Recipe, difference
from .train import train
from .weights import WEIGHTS_FILES, ModelCard, load_model

__all__ = [
    "PREDICTIONS_FILE",
    "RESULT_FILE",
    "WEIGHTS_FILES",
    "AtomicCheckpointIO",
    "ClassificationTask",
    "Display",
    "Machine",
    "ModelCard",
    "Predictions",
    "Recipe",
    "Run",
    "RunProgress",
    "data_module",
    "difference",
    "environment",
    "evaluate",
    "load_model",
    "locked",
    "new_model",
    "new_trainer",
    "predict",
    "read_data",
    "score",
    "train",
    "train_run",
]
