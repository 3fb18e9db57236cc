"""Options that several commands share."""

from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from ..tasks import TASKS, Machine, task_named


def add_run_options(parser: ArgumentParser, task: str) -> None:
    """The task, and the options of its recipe and of the machine, each under its own name.

    Raises:
        UnknownNameError: There is no such task.
    """
    recipe = task_named(task).recipe_class
    parser.add_argument("--task", choices=sorted(TASKS), default=task, help="What is learned.")
    for cls in (recipe, Machine):
        parser.add_class_arguments(cls, as_group=True)


def recipe_and_machine(options: dict[str, Any]) -> tuple[Any, Machine]:
    """A recipe and a machine of their options, which are taken out of the others."""
    classes: tuple[Any, Any] = task_named(options.pop("task")).recipe_class, Machine
    recipe, machine = (cls(**{f.name: options.pop(f.name) for f in fields(cls)}) for cls in classes)
    return recipe, machine
