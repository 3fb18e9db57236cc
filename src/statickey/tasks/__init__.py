"""Training, scoring and using networks for any task, under Lightning."""

from .accuracy import Accuracy
from .attention import show_attention
from .checkpoint import AtomicCheckpointIO
from .classification import Classification, ClassificationRecipe
from .conversion import convert_run
from .detection import Detection, DetectionRecipe
from .display import Display, RunProgress, RunsDisplay, counted, facts_table
from .diverged import replay
from .engine import new_trainer, train_run
from .evaluate import evaluate
from .folder import free, locked
from .loading import load_model, network_of
from .predict import Predictions, predict
from .recipe import Machine, Recipe, difference, identities
from .registry import TASKS, task_named, task_of
from .repair import Repair, RepairRecipe
from .run import PREDICTIONS_FILE, Run, read_result
from .samples import images_for
from .segmentation import Segmentation, SegmentationRecipe
from .start import RESULT_FILE
from .task import Answer, Evidence, Metric, ScoreOn, Task
from .train import train
from .training import TrainingModule
from .weights import WEIGHTS_FILES, ModelCard, write_model

__all__ = [
    "PREDICTIONS_FILE",
    "RESULT_FILE",
    "TASKS",
    "WEIGHTS_FILES",
    "Accuracy",
    "Answer",
    "AtomicCheckpointIO",
    "Classification",
    "ClassificationRecipe",
    "Detection",
    "DetectionRecipe",
    "Display",
    "Evidence",
    "Machine",
    "Metric",
    "ModelCard",
    "Predictions",
    "Recipe",
    "Repair",
    "RepairRecipe",
    "Run",
    "RunProgress",
    "RunsDisplay",
    "ScoreOn",
    "Segmentation",
    "SegmentationRecipe",
    "Task",
    "TrainingModule",
    "convert_run",
    "counted",
    "difference",
    "evaluate",
    "facts_table",
    "free",
    "identities",
    "images_for",
    "load_model",
    "locked",
    "network_of",
    "new_trainer",
    "predict",
    "read_result",
    "replay",
    "show_attention",
    "task_named",
    "task_of",
    "train",
    "train_run",
    "write_model",
]
