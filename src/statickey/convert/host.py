"""What a model must tell so that its attention can be swapped: its places, and what it becomes afterwards."""

import copyreg
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .._typing import InputFmt, Size2
from ..errors import UnsupportedHostError
from ..layers import AttentionMixer, HeadMix, Reduction, SelfAttention, StaticKeyAttention, TokenMixer
from .keys import check_shapes, set_key, set_key_size, set_off_grid, token_mixers


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in a host where a mixer can stand, and what of the module there a mixer takes over.

    ``Site.of`` reads all it can from a module with timm's names (``qkv``, ``proj``, ``num_heads``, drops).

    Args:
        module: The module that stands there now.
        dim: Channels.
        num_heads: Heads of a mixer that stands there.
        head_dim: Width of one head.
        value_dim: Width of a head's value, where it is another.
        out_dim: Channels of the output, where they are others than ``dim``.
        feat_size: The token grid (H, W) there.
        num_prefix_tokens: Class and register tokens before the grid.
        input_fmt: Tokens, or maps with channels last or first.
        is_attention: Whether ``layers="all"`` and indices mean this place too.
        replaceable: Whether ``"all"`` means this place while any such is left; not where a mixer other than
            self-attention stands.
        needs_map: Whether the host adds a bias to the logits, so that only attention can stand there.
        mixer_args: What the module's logits need beyond its weights: scale, temperature, masked diagonal.
        log_temperature: The learned temperature to carry over, if any.
        qkv_weight: The packed projections to carry over, if any: rows are all q, all k, all v, (2*h*d + h*dv, dim).
        qkv_bias: Their bias, if any.
        qkv_norm: A batch norm behind them, if any, of the same rows.
        proj: The output projection to carry over, a linear layer or a 1 x 1 convolution, if any.
        with_proj: Whether a mixer has one.
        proj_norm: A batch norm behind it, if any.
        with_qkv_bias: Whether a mixer's projections have a bias.
        with_proj_bias: Whether a mixer's output projection has one.
        attn_drop: Dropout rate on the attention weights.
        proj_drop: Dropout rate on the output.
        q_norm: Norm of each head's query, kept.
        k_norm: Norm of each head's key, kept where the key is dynamic.
        out_norm: Norm before the output projection, kept.
        head_mix: Mixing of heads around the softmax, kept.
        gate: Linear layer (dim -> h*d) whose sigmoid multiplies the input of the output projection, kept.
        rotate_half: Where the host passes a rotary position embedding (``rope`` of a mixer's ``forward``), how it
            pairs channels: the two halves, or neighbours. None where there is none.
        adds_pos_embed: Whether the host passes a position embedding of queries and keys alone (``pos_embed`` of a
            mixer's ``forward``).
        query_bias: Position bias that the query makes, kept.
        tokens_per_query: How many tokens ``q_norm`` makes one query of.
        reduction: What the host makes of its tokens before it projects them to keys and values, kept.
        init_weights: How the host initialises a linear layer or convolution, for projections not carried over.
        wrap: Makes the module to install from the mixer; the mixer itself by default.
        macs: Multiply-accumulates of the module there now, for one image.
        windows: How often a mixer there runs per image.
    """

    module: nn.Module
    dim: int
    num_heads: int
    head_dim: int
    feat_size: Size2
    value_dim: int | None = None
    out_dim: int | None = None
    num_prefix_tokens: int = 0
    input_fmt: InputFmt = "NLC"
    is_attention: bool = True
    replaceable: bool = True
    needs_map: bool = False
    mixer_args: Mapping[str, Any] = field(default_factory=dict)
    log_temperature: Tensor | None = None
    qkv_weight: Tensor | None = None
    qkv_bias: Tensor | None = None
    qkv_norm: nn.Module | None = None
    proj: nn.Module | None = None
    with_proj: bool = True
    proj_norm: nn.Module | None = None
    with_qkv_bias: bool = False
    with_proj_bias: bool = True
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    out_norm: nn.Module | None = None
    head_mix: HeadMix | None = None
    gate: nn.Module | None = None
    rotate_half: bool | None = None
    adds_pos_embed: bool = False
    query_bias: nn.Module | None = None
    tokens_per_query: int = 1
    reduction: Reduction | None = None
    init_weights: Callable[[nn.Module], None] | None = None
    wrap: Callable[[TokenMixer], nn.Module] | None = None
    macs: int = 0
    windows: int = 1

    @classmethod
    def of(
        cls, module: Any, *, feat_size: Size2, num_prefix_tokens: int = 0, windows: int = 1, **fields: Any
    ) -> Self:
        """Read a site from an attention module with timm's names.

        Args:
            module: Has ``qkv`` (Linear) and ``proj`` (Linear), ``num_heads`` and possibly ``attn_drop`` and
                ``proj_drop``; what has another name is given as a field.
            feat_size: The token grid (H, W) it works on.
            num_prefix_tokens: Tokens before the grid.
            windows: How often it runs per image, for the count of multiply-accumulates.
            fields: Any field of ``Site``; replaces what was read.
        """
        weight = fields.pop("qkv_weight", None)
        weight = module.qkv.weight if weight is None else weight
        weight = weight.flatten(1)
        bias = fields.pop("qkv_bias", None)
        if bias is None and getattr(module, "qkv", None) is not None:
            bias = getattr(module.qkv, "bias", None)
        num_heads = fields.pop("num_heads", None) or module.num_heads
        proj = fields.pop("proj", None) or (module.proj if fields.get("with_proj", True) else None)
        rows, dim = weight.shape
        value_dim = fields.pop("value_dim", None) or rows // 3 // num_heads
        values = num_heads * value_dim
        inner, out_dim = (rows - values) // 2, values if proj is None else proj.weight.shape[0]
        tokens = num_prefix_tokens + feat_size[0] * feat_size[1]
        mixing = 0 if fields.get("head_mix") is None else 2 * num_heads**2 * tokens**2
        projected = 0 if proj is None else out_dim
        queries = tokens // fields.get("tokens_per_query", 1)
        reduction = fields.get("reduction")
        keys = tokens if reduction is None else math.prod(reduction.grid(feat_size))
        macs = dim * (tokens * inner + keys * (inner + values))
        macs += queries * (values * projected + (inner + values) * keys)
        macs += 0 if reduction is None else reduction.macs(feat_size)
        macs += 0 if fields.get("gate") is None else tokens * dim * values
        drops = {drop: getattr(getattr(module, drop, None), "p", 0.0) for drop in ("attn_drop", "proj_drop")}
        read = {
            "dim": dim,
            "num_heads": num_heads,
            "head_dim": inner // num_heads,
            "value_dim": value_dim,
            "out_dim": out_dim,
            "qkv_weight": weight,
            "qkv_bias": bias,
            "proj": proj,
            "with_qkv_bias": bias is not None,
            "with_proj_bias": proj is not None and proj.bias is not None,
            **drops,
            "macs": windows * (macs + mixing),
            "windows": windows,
        }
        return cls(module=module, feat_size=feat_size, num_prefix_tokens=num_prefix_tokens, **(read | fields))

    @classmethod
    def of_mixer(cls, mixer: TokenMixer, **fields: Any) -> Self:
        """Read a site from a mixer that stands there already; see ``carry_between`` for what it hands on."""
        fields |= {name: getattr(mixer, name) for name in ("feat_size", "num_prefix_tokens", "input_fmt")}
        if isinstance(mixer, AttentionMixer):
            kept: tuple[str, ...] = (
                "q_norm",
                "out_norm",
                "head_mix",
                "gate",
                "query_bias",
                "tokens_per_query",
                "reduction",
            )
            kept = (*kept, "value_dim", "log_temperature")
            fields |= {name: getattr(mixer, name) for name in kept} | {"mixer_args": _logit_args(mixer)}
            fields["with_proj"] = isinstance(mixer.proj, nn.Linear)
            fields["proj_norm"] = getattr(mixer.proj, "norm", None)
            fields["qkv_norm"] = getattr(getattr(mixer, "qkv", getattr(mixer, "qv", None)), "norm", None)
        if isinstance(mixer, SelfAttention):
            return cls.of(mixer, k_norm=mixer.k_norm, **fields)
        fields["k_norm"] = getattr(mixer, "k_norm", None)
        projections = (getattr(mixer, name, None) for name in ("qv", "v"))
        fields["with_qkv_bias"] = any(part is not None and part.bias is not None for part in projections)
        proj = getattr(mixer, "proj", None)
        fields["with_proj_bias"] = getattr(proj, "bias", None) is not None
        fields["out_dim"] = proj.out_features if isinstance(proj, nn.Linear) else None
        fields |= {"attn_drop": mixer.attn_drop.p, "proj_drop": mixer.proj_drop.p}
        return cls(
            module=mixer,
            dim=mixer.dim,
            num_heads=mixer.num_heads,
            head_dim=mixer.head_dim,
            is_attention=mixer.layout == "NLC",
            replaceable=False,
            macs=mixer.macs() * fields.get("windows", 1),
            **fields,
        )


def _logit_args(mixer: AttentionMixer) -> dict[str, Any]:
    args: dict[str, Any] = {}
    if not isinstance(mixer, SelfAttention | StaticKeyAttention):
        return args
    if mixer.scale != mixer.head_dim**-0.5:
        args["scale"] = mixer.scale
    if mixer.log_temperature is not None:
        args["learned_temperature"] = True
    if mixer.mask_diagonal:
        args["mask_diagonal"] = True
    return args


class StaticKeyHost(nn.Module):
    """Mixin of converted models: what the host's own class does not know about mixers.

    Attributes: ``state_dict_filter``, applied to every state dict before it is loaded, or None.
    """

    class_prefix: ClassVar[str] = "StaticKey"
    """What the name of a converted class has before the host's."""

    state_dict_filter: Callable[[Mapping[str, Any], nn.Module], Mapping[str, Any]] | None = None

    def no_weight_decay(self) -> set[str]:
        """The host's names, every mixer's keys, and the position bias of windows."""
        inherited = getattr(super(), "no_weight_decay", None)
        names: set[str] = set() if inherited is None else set(inherited())
        for prefix, mixer in token_mixers(self).items():
            names |= {f"{prefix}.{name}" for name in mixer.no_weight_decay()}
        return names | {name for name, _ in self.named_parameters() if ".rel_pos." in name}

    set_key_size = set_key_size
    set_off_grid = set_off_grid
    set_key = set_key

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load, after refusing a tensor of another shape by name; see ``torch.nn.Module.load_state_dict``.

        Raises:
            StaticKeyError: A tensor has another shape than the model's.
        """
        if self.state_dict_filter is not None:
            state_dict = self.state_dict_filter(state_dict, self)
        check_shapes(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def __reduce__(self) -> tuple[Any, ...]:
        return reduce_converted(self)


@dataclass(frozen=True, kw_only=True)
class HostRule:
    """How ``convert`` handles a class of models and its subclasses.

    Args:
        host: The class.
        sites: Lists the places of a model by module name, in order of depth; raises
            ``UnsupportedHostError`` when the model, or a module of it, cannot be swapped.
        mixin: What the model's class gains; a subclass of ``StaticKeyHost`` may add methods.
        finish: Called with the model after the swap.
        takes: Whether a model of the class can be meant, where the class says too little; by default all.
    """

    host: type[nn.Module]
    sites: Callable[[Any], dict[str, Site]]
    mixin: type[StaticKeyHost] = StaticKeyHost
    finish: Callable[[Any], None] | None = None
    takes: Callable[[Any], bool] | None = None


_RULES: dict[type[nn.Module], HostRule] = {}

_RULES_OF_PACKAGES = {"transformers": "hugging_face", "torchvision": "torchvision_models"}
"""Modules with rules for the classes of a package, imported when a model of it is met."""


def register_host_rule(rule: HostRule) -> None:
    """Teach ``convert`` a class of models; a later rule for the same class replaces the earlier one.

    Example:
        A model whose blocks hold an attention module with timm's names, on a fixed 8 x 8 grid::

            def sites(model):
                return {
                    f"blocks.{i}.attn": Site.of(block.attn, feat_size=(8, 8))
                    for i, block in enumerate(model.blocks)
                }

            register_host_rule(HostRule(host=MyModel, sites=sites))
            convert(MyModel(), "ska")

        Where its attention has names of its own, give what they hold. In the style of vit-pytorch, whose attention
        also normalises its input::

            def sites(model):
                return {
                    f"transformer.layers.{i}.0": Site.of(
                        attn,
                        feat_size=(8, 8),
                        num_prefix_tokens=1,
                        num_heads=attn.heads,
                        qkv_weight=attn.to_qkv.weight,
                        proj=attn.to_out[0],
                        proj_drop=attn.to_out[1].p,
                        wrap=partial(nn.Sequential, attn.norm),
                    )
                    for i, (attn, _) in enumerate(model.transformer.layers)
                }

        The mixer takes the place of the attention module and is called as that was: ``mixer(x)`` on
        (B, N, dim). ``Site.wrap`` bridges other calling conventions.
    """
    _RULES[rule.host] = rule


def find_rule(model: nn.Module) -> HostRule:
    """The rule for the nearest class a model derives from.

    Raises:
        UnsupportedHostError: There is none; lists the attention classes found and the supported hosts.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedHostError(f"convert takes a model, got {model!r}; for a name: timm.create_model({model!r})")
    rule = _rule_of_class(model)
    if rule is not None:
        return rule
    reasons = refusal_reasons(model)
    if reasons:
        raise UnsupportedHostError(f"{type(model).__name__} has no attention this can convert: {reasons}")
    found = attention_classes(model)
    supported = ", ".join(sorted(f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for cls in _RULES))
    raise UnsupportedHostError(
        f"{type(model).__module__}.{type(model).__name__} is not a host this can convert (attention classes in it: "
        f"{', '.join(found) if found else 'none'}); supported: {supported}; for a model of your own see "
        "help(statickey.register_host_rule)"
    )


def has_rule(model: nn.Module) -> bool:
    """Whether there is a rule for a class that a model derives from, and it takes the model."""
    rule = _rule_of_class(model)
    return rule is not None and (rule.takes is None or rule.takes(model))


def _rule_of_class(model: nn.Module) -> HostRule | None:
    for package in {cls.__module__.partition(".")[0] for cls in type(model).__mro__} & _RULES_OF_PACKAGES.keys():
        import_module(f"{__package__}.{_RULES_OF_PACKAGES[package]}")
    return next((_RULES[cls] for cls in type(model).__mro__ if cls in _RULES), None)


_REASONS: dict[type[nn.Module], str] = {}


def register_reason(cls: type[nn.Module], reason: str) -> None:
    """Let refusals say why no mixer can stand for a class of modules: ``reason`` follows the name of the class."""
    _REASONS[cls] = reason


def refusal_reasons(model: nn.Module) -> str:
    """Why what is known in a model has no place for mixers; empty where nothing is known."""
    classes = dict.fromkeys(type(module) for module in model.modules())
    return "; ".join(f"{cls.__name__} {_REASONS[cls]}" for cls in classes if cls in _REASONS)


def attention_classes(model: nn.Module) -> list[str]:
    """Names of the classes in a model that call themselves attention."""
    names = {type(module).__name__ for module in model.modules()}
    return sorted(name for name in names if "attn" in name.lower() or "attention" in name.lower())


_CONVERTED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def converted_class(mixin: type[nn.Module], host: type[nn.Module]) -> type[nn.Module]:
    """The class of a converted ``host``; made once, so that types compare equal."""
    if (mixin, host) not in _CONVERTED:
        name = getattr(mixin, "class_prefix", "") + host.__name__
        _CONVERTED[mixin, host] = type(name, (mixin, host), {"__module__": host.__module__})
    return _CONVERTED[mixin, host]


def reduce_converted(module: nn.Module) -> tuple[Any, ...]:
    """How to pickle and copy an object whose class ``converted_class`` made, or a class derived from one."""
    bases = type(module).__bases__
    if _CONVERTED.get(bases) is type(module):  # type: ignore[arg-type]
        return _empty, bases, module.__dict__
    return copyreg.__newobj__, (type(module),), module.__dict__  # type: ignore[attr-defined]


def become_converted(model: nn.Module, rule: HostRule) -> None:
    """Give the model's class the rule's mixin, in place."""
    if not isinstance(model, StaticKeyHost):
        model.__class__ = converted_class(rule.mixin, type(model))


def _empty(mixin: type[nn.Module], host: type[nn.Module]) -> nn.Module:
    cls = converted_class(mixin, host)
    return cls.__new__(cls)


def packed_bias(q_bias: Tensor | None, v_bias: Tensor | None) -> Tensor | None:
    """The bias of a packed qkv whose key has none, (3*h*d,)."""
    if q_bias is None or v_bias is None:
        return None
    return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
