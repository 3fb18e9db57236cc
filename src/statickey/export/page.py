"""A page for the hub."""

from pathlib import Path
from typing import Any

import yaml

from ..tasks import RESULT_FILE, ModelCard, read_result


def model_page(source: str, card: ModelCard) -> str:
    """What a classifier is, how to load it, and what it scored, as Markdown with the hub's head.

    Args:
        source: Where it comes from; the folder of a run says what it scored.
        card: How it is built, completed.
    """
    where = Path(source) / RESULT_FILE
    result = read_result(Path(source)) if where.is_file() else None
    head: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "statickey"],
    }
    name = card.architecture if card.mixer is None else f"{card.architecture} with {card.mixer}"
    lines = [f"# {name}", "", f"{len(card.class_names)} classes, images of {card.img_size} pixels.", ""]
    if result is not None:
        data, score = Path(result["data"]).name, round(result["accuracy"], 2)
        metric = {"type": "accuracy", "value": score}
        found = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": data},
            "metrics": [metric],
        }
        head["model-index"] = [{"name": name, "results": [found]}]
        split = result.get("score_on", "test")
        lines += [
            f"Accuracy on {result['scored_images']} {split} images of {data}: {score} %, after "
            f"{len(result['curve'])} epochs, seed {result['seed']}.",
            "",
        ]
    lines += [
        "```python",
        "import statickey",
        "",
        'model, card = statickey.tasks.load_model("FOLDER")  # needs pip install "statickey[train]"',
        "```",
        "",
        f"Images are RGB in 0 to 1 with mean {list(card.mean)} and standard deviation {list(card.std)} taken out."
        if card.in_chans == 3
        else f"Images have {card.in_chans} channels in 0 to 1 with mean {list(card.mean)} and standard deviation "
        f"{list(card.std)} taken out.",
        "",
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n".join(lines)
