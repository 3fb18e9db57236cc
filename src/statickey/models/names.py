"""What a model's name stands for: one of timm's registry, perhaps with a tag, on the hub, or in a folder."""

import json
from dataclasses import dataclass
from pathlib import Path

import timm
from timm.models import get_arch_pretrained_cfgs, parse_model_name, resolve_model_input_args, split_model_name_tag

from .._checks import check_name
from .._files import regular
from ..errors import StaticKeyError, UnknownNameError
from .weights import CONFIG_FILE, WEIGHTS_FILE


@dataclass(frozen=True)
class NamedModel:
    """A name that ``timm.create_model`` takes, looked up.

    Attributes: ``architecture``, in timm's registry; ``run_weights``, where the name is the folder of a run of this
    package, its weights; ``run_mixer``, the mixer that run put into a host of timm's.
    """

    architecture: str
    run_weights: Path | None = None
    run_mixer: str | None = None


def look_up(name: str) -> NamedModel:
    """Find the architecture behind a name, a name with a tag, ``hf-hub:`` or ``local-dir:``.

    Raises:
        UnknownNameError: There is no such architecture or tag.
        StaticKeyError: The hub cannot be reached, or the folder holds no model.
    """
    if not isinstance(name, str):
        check_name("model", name, timm.list_models())
    try:
        source, model_id = parse_model_name(name)
    except ValueError as error:
        raise UnknownNameError(f"model={name!r}: {one_line(error)}") from error
    if source is None:
        architecture, tag = split_model_name_tag(model_id)
        if not timm.is_model(architecture):  # which knows deprecated names too
            check_name("model", architecture, timm.list_models())
        _check_tag(architecture, tag)
        return NamedModel(architecture)
    try:
        architecture = resolve_model_input_args(name)["model_name"]
        config = (
            json.loads(regular(Path(model_id) / CONFIG_FILE).read_text(encoding="utf-8"))
            if source == "local-dir"
            else {}
        )
        own = config.get("statickey")
    except Exception as error:  # the hub and its transport raise of all kinds
        remedy = "give a folder with the config.json of a timm model" if source == "local-dir" else HUB_REMEDY
        raise StaticKeyError(f"cannot read the model {name!r}: {one_line(error)}; {remedy}") from error
    if not isinstance(own, dict):
        return NamedModel(architecture)
    mixer = own.get("mixer")
    return NamedModel(architecture, Path(model_id) / WEIGHTS_FILE, mixer if isinstance(mixer, str) else None)


HUB_REMEDY = (
    "connect to the network once, or give local-dir:FOLDER for a name, or checkpoint_path in model_args, with a copy"
)


def one_line(error: BaseException) -> str:
    """What an error of another library says, in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _check_tag(architecture: str, tag: str) -> None:
    tags = [split_model_name_tag(known)[1] for known in get_arch_pretrained_cfgs(architecture)]
    if not tag or tag in tags:
        return
    if not any(tags):
        raise UnknownNameError(f"{architecture} has no tags; leave out {'.' + tag!r}")
    check_name(f"tag of {architecture}", tag, filter(None, tags))
