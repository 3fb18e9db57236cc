"""Size and cost of a model, from its shapes alone, beside what was published."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .._checks import check_name
from ..convert import attention_classes, convert, token_mixers
from ..errors import StaticKeyError, UnsupportedHostError
from ..layers import AttentionMixer, TokenMixer
from .build import count_macs, is_ours

SAME = 0.05
"""Published MACs within this fraction of ours count as the same; parameters, printed in millions, within one."""


@dataclass(frozen=True)
class Published:
    """What a paper states, as printed there: millions of parameters, and what it calls FLOPs in GMACs."""

    source: str
    params_m: float
    gmacs: float


SKA_PAPER = "arXiv 2412.07049"
METAFORMER_PAPER = "arXiv 2210.13452"
PUBLISHED = {
    "skaformer_s18": Published(SKA_PAPER, 26, 4.0),
    "skaformer_b36": Published(SKA_PAPER, 97, 22.8),
    "cskaformer_s18": Published(SKA_PAPER, 28, 4.1),
    "cskaformer_b36": Published(SKA_PAPER, 119, 24.2),
    "caformer_s18": Published(METAFORMER_PAPER, 26, 4.1),
    "caformer_b36": Published(METAFORMER_PAPER, 99, 23.2),
    "cska_lsa_vit_small_patch4_32": Published(SKA_PAPER, 10.0, 1.33 / 2),
}
"""Figures by model name; the small transformers' published FLOPs are 2 x MACs."""


@dataclass(frozen=True)
class ModelFigures:
    """Size and cost of one model on one image.

    Attributes: ``params``; ``macs``, multiply-accumulates of products and convolutions (FLOPs are twice that);
    ``attention_macs``, the part inside attention, projections included; ``activations``, elements that products
    and convolutions write; ``key_params``, parameters tied to the token grid; ``key_macs``, logits and weighted
    sums in attention with static keys.
    """

    name: str
    input_size: tuple[int, int, int]
    params: int
    macs: int
    attention_macs: int
    activations: int
    key_params: int
    key_macs: int
    published: Published | None

    @property
    def differences(self) -> list[str]:
        """Where the published figures differ, and the part of ours that explains it."""
        if self.published is None:
            return []
        found = []
        for what, ours, theirs, keys in (
            ("params", self.params / 1e6, self.published.params_m, self.key_params / 1e6),
            ("GMACs", self.macs / 1e9, self.published.gmacs, self.key_macs / 1e9),
        ):
            if abs(ours - theirs) <= (1 if what == "params" else SAME * theirs):
                continue
            part = "the keys" if what == "params" else "logits and weighted sums of static keys"
            without = f"{part} are {keys:#.3g} of it, {ours - keys:#.3g} without"
            found.append(f"{what}: published {theirs:g}, ours {ours:#.3g}; {without}")
        return found


def model_figures(name: str, *, img_size: int | None = None, mixers: Sequence[str] | None = None) -> ModelFigures:
    """Build a model without memory and count.

    Multiply-accumulates of this package's models are counted twice: by torch's counter on the unfused path, and in
    closed form, from the shapes of convolutions and linear layers and every mixer's formula.

    Args:
        name: A model of this package, or a timm model whose attention ``convert`` knows.
        img_size: Side of the image; default the model's own.
        mixers: A mixer per stage, for the MetaFormers of this package.

    Returns:
        The figures.

    Raises:
        UnknownNameError: No such model.
        UnsupportedHostError: Its attention cannot be counted.
        StaticKeyError: The model refuses its arguments, or the two counts differ.
    """
    check_name("model", name, timm.list_models())
    kwargs: dict[str, Any] = {} if mixers is None else {"mixers": tuple(mixers)}
    if img_size is not None:
        kwargs["img_size"] = img_size
    try:
        model, input_size = _create(name, kwargs)
    except StaticKeyError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise StaticKeyError(f"model {name!r} refuses {kwargs}: {error}") from error
    params = sum(p.numel() for p in model.parameters())
    activations = _Activations()  # type: ignore[no-untyped-call]
    with activations:
        closed, attention, key_macs = _closed_form(_unfused(model), input_size)
    macs = count_macs(model, input_size)
    ours = is_ours(name)  # others may have products we know nothing of
    if ours and macs != closed:
        raise StaticKeyError(f"{name}: {closed:,} MACs in closed form, {macs:,} counted; please report this")
    parts = token_mixers(model).values()
    key_params = sum(part.get_parameter(name).numel() for part in parts for name in part.no_weight_decay())
    published = PUBLISHED.get(name) if not kwargs else None
    return ModelFigures(name, input_size, params, macs, attention, activations.total, key_params, key_macs, published)


def _create(name: str, kwargs: dict[str, Any]) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model without memory, its attention in mixers that have a formula, and the input it was checked on."""
    size = kwargs.get("img_size")
    with torch.device("meta"):
        try:
            model = timm.create_model(name, **kwargs)
        except TypeError:
            if size is None:
                raise
            model = timm.create_model(name, **{key: value for key, value in kwargs.items() if key != "img_size"})
    if not token_mixers(model):
        try:
            convert(model, "mhsa")  # the same function and parameters
        except UnsupportedHostError:
            if attention_classes(model):
                raise
    if size is not None and hasattr(model, "set_input_size"):
        model.set_input_size((size, size))
    channels, height, width = get_model_input_config(model)["input_size"]
    input_size = (channels, height, width) if size is None else (channels, size, size)
    with torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device="meta"))
    return model, input_size


def _closed_form(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[int, int, int]:
    """MACs of the model, of its attention, and of the products with static keys."""
    total = attention = keys = 0
    mixers = token_mixers(model).values()
    inside = {id(module) for mixer in mixers for module in mixer.modules()}

    def add_layer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        weight: Any = module.weight
        positions = output.numel() // weight.shape[0]  # batch of one
        total += positions * weight.numel()

    def add_mixer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total, attention, keys
        assert isinstance(module, TokenMixer)
        macs = module.macs() * output.shape[0]  # once per window
        total += macs
        attention += macs if module.no_weight_decay() or isinstance(module, AttentionMixer) else 0
        keys += _key_macs(module) * output.shape[0]

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and id(m) not in inside]
    handles = [layer.register_forward_hook(add_layer) for layer in layers]
    handles += [mixer.register_forward_hook(add_mixer) for mixer in mixers]
    try:
        with torch.no_grad():
            model.eval()(torch.empty(1, *input_size, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return total, attention, keys


def _key_macs(mixer: TokenMixer) -> int:
    if not mixer.no_weight_decay():  # which names keys
        return 0
    linear = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, nn.Linear)) * mixer.num_tokens
    convolved = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, nn.Conv2d))
    return mixer.macs() - linear - convolved * mixer.feat_size[0] * mixer.feat_size[1]


def _unfused(model: nn.Module) -> nn.Module:
    for mixer in token_mixers(model).values():
        if isinstance(mixer, AttentionMixer):
            mixer.backend = "math"
    return model.eval()


class _Activations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the elements that products and convolutions write."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **({} if kwargs is None else kwargs))
        if func._overloadpacket in flop_registry:
            self.total += out.numel()
        return out
