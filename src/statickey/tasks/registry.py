"""The tasks by name."""

from .._checks import check_name
from ..errors import StaticKeyError
from .classification import Classification
from .detection import Detection
from .recipe import Recipe
from .repair import Repair
from .segmentation import Segmentation
from .task import Task

TASKS: dict[str, Task] = {task.name: task for task in (Classification(), Detection(), Segmentation(), Repair())}
"""Tasks by name. Add one of your own under a new name, and its recipes train and compare."""


def task_named(name: str) -> Task:
    """The task of a name; refuses an unknown one."""
    check_name("task", name, TASKS)
    if TASKS[name].name != name:
        raise StaticKeyError(f"TASKS[{name!r}] calls itself {TASKS[name].name!r}; register it under its own name")
    return TASKS[name]


def task_of(recipe: Recipe) -> Task:
    """The task that a recipe is for.

    Raises:
        StaticKeyError: It is for none.
    """
    found = [task for task in TASKS.values() if type(recipe) is task.recipe_class]
    if len(found) == 1:
        return found[0]
    if found:
        raise StaticKeyError(
            f"the tasks {' and '.join(task.name for task in found)} share {type(recipe).__name__}, which then names "
            "none of them; give each a recipe class of its own"
        )
    known = ", ".join(task.recipe_class.__name__ for task in TASKS.values())
    raise StaticKeyError(f"recipe is a {type(recipe).__name__}, which is of no task; use {known}")
