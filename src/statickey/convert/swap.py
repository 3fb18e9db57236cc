"""The one swap path: places of a model are filled by mixers, all of those asked for or none."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .._checks import check_arguments, check_mapping, check_name, check_positive
from .._typing import Size2
from ..errors import StaticKeyError, UnsupportedHostError
from ..layers import (
    MIXERS,
    AttentionMixer,
    NormedLinear,
    PartlyStaticAttention,
    Reduction,
    SelfAttention,
    SharedKeyValueAttention,
    StaticKeyAttention,
    TokenMixer,
    has_static_key,
)
from .again import carry_between
from .host import Site, become_converted
from .keys import forked_random
from .wrappers import Host, find_host

Layers = str | int | Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class ConvertedModule:
    """One module that was replaced; MACs are those of one image; ``key_carried`` is false where a key is fresh."""

    name: str
    replaced: str
    feat_size: Size2
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    key_carried: bool = False


@dataclass(frozen=True)
class ConversionReport:
    """What ``convert`` did. ``print`` it for a table."""

    mixer: str
    modules: tuple[ConvertedModule, ...]
    params_before: int
    params_after: int

    @property
    def macs_before(self) -> int:
        """Multiply-accumulates of the replaced modules, for one image."""
        return sum(module.macs_before for module in self.modules)

    @property
    def macs_after(self) -> int:
        """Multiply-accumulates of the modules in their place, for one image."""
        return sum(module.macs_after for module in self.modules)

    def __str__(self) -> str:
        width = max(len(module.name) for module in self.modules)
        lines = [
            f"{m.name:<{width}}  {m.replaced} -> {self.mixer}  {m.feat_size[0]}x{m.feat_size[1]}  "
            f"params {m.params_before:,} -> {m.params_after:,}  MACs {m.macs_before:,} -> {m.macs_after:,}"
            + (", key carried over" if m.key_carried else "")
            for m in self.modules
        ]
        lines.append(
            f"{len(self.modules)} modules, model params {self.params_before:,} -> {self.params_after:,}, "
            f"MACs of these modules {self.macs_before:,} -> {self.macs_after:,}"
        )
        return "\n".join(lines)


def convert(
    model: nn.Module,
    mixer: str,
    *,
    layers: Layers = "all",
    keep_weights: bool = True,
    mixer_args: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Replace the attention of a model by a mixer with fresh keys, in place; see ``statickey.convert``."""
    check_name("mixer", mixer, MIXERS)
    with torch.enable_grad():  # so that packed weights tell whether they are frozen
        found = find_host(model)
    host, rule, sites = found
    chosen = select_sites(sites, layers)
    before = _num_params(model)
    like = next(host.parameters())
    args = check_mapping("mixer_args", mixer_args)
    fixed = args.keys() & {"feat_size", "num_prefix_tokens", "device", "dtype"}
    if fixed:
        raise StaticKeyError(f"mixer_args has {', '.join(sorted(fixed))}, which follow from the host; leave them out")
    new: dict[str, TokenMixer] = {}
    carried: set[str] = set()
    with forked_random(like):
        # drawn here, not kept: what the host draws next does not depend on the swap
        seed = int(torch.randint(2**31, (), device="cpu"))
        for index, (name, site) in enumerate(sites.items()):
            if name in chosen:
                new[name] = _build_mixer(name, site, mixer, args, keep_weights, like, seed + index)
                old_mixer = _mixer_of(site)
                if keep_weights and old_mixer is not None and carry_between(name, old_mixer, new[name]):
                    carried.add(name)
    old = {name: _num_params(model.get_submodule(name)) for name in new}
    with all_or_nothing(model, found, new):
        for name, built in new.items():
            site = sites[name]
            installed = built if site.wrap is None else site.wrap(built)
            _install(model, name, installed.train(site.module.training))
        become_converted(host, rule)
        if rule.finish is not None:
            rule.finish(host)
    modules = tuple(
        ConvertedModule(
            name,
            type(sites[name].module).__name__,
            sites[name].feat_size,
            old[name],
            _num_params(model.get_submodule(name)),
            sites[name].macs,
            built.macs() * sites[name].windows,
            name in carried,
        )
        for name, built in new.items()
    )
    return ConversionReport(mixer, modules, before, _num_params(model))


@contextmanager
def all_or_nothing(model: nn.Module, found: Host, names: Iterable[str]) -> Iterator[None]:
    """On an error or interruption inside, put back the modules of these names, and all classes."""
    host, rule, _ = found
    kept = {name: model.get_submodule(name) for name in names}
    kinds = {module: type(module) for module in host.modules()}
    try:
        yield
    except BaseException:
        for name, module in kept.items():
            _install(model, name, module)
        for module, kind in kinds.items():
            module.__class__ = kind
        if rule.finish is not None:
            rule.finish(host)  # it tells of what stands there
        raise


def _install(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def select_sites(sites: Mapping[str, Site], layers: Layers) -> set[str]:
    """The names that ``layers`` of ``convert`` stands for.

    Raises:
        UnsupportedHostError: The host has no attention left.
        StaticKeyError: An index or a pattern names nothing.
    """
    attention = [name for name, site in sites.items() if site.is_attention]
    wanted: Sequence[Any] = [layers] if isinstance(layers, str | int) else layers
    if not isinstance(wanted, Sequence) or not wanted:
        raise StaticKeyError(f'layers={layers!r} names no module; pass "all", indices or name patterns')
    chosen: set[str] = set()
    for item in wanted:
        if item == "all":
            left = [name for name in attention if sites[name].replaceable] or attention
            if not left:
                raise UnsupportedHostError(
                    f"no attention module to replace; name token mixers instead, of {', '.join(sites) or 'none'}"
                )
            chosen.update(left)
        elif isinstance(item, int) and not isinstance(item, bool):
            if not -len(attention) <= item < len(attention):
                raise StaticKeyError(f"layers has index {item}, but the model has {len(attention)} attention modules")
            chosen.add(attention[item])
        elif isinstance(item, str):
            matches = [name for name in sites if fnmatchcase(name, item) or fnmatchcase(name, f"{item}.*")]
            if not matches:
                raise StaticKeyError(f"layers={item!r} matches none of {', '.join(sites)}")
            chosen.update(matches)
        else:
            raise StaticKeyError(f'layers has {item!r}; pass "all", indices or name patterns')
    return chosen


def _mixer_of(site: Site) -> TokenMixer | None:
    """The mixer that stands at a site, other than self-attention, whose weights are those of any host."""
    mixer = site.module
    return mixer if isinstance(mixer, TokenMixer) and not isinstance(mixer, SelfAttention) else None


def _build_mixer(
    name: str, site: Site, mixer: str, args: dict[str, Any], keep_weights: bool, like: torch.Tensor, seed: int
) -> TokenMixer:
    check_positive(**{key: args[key] for key in ("num_heads", "head_dim") if args.get(key) is not None})
    args = dict(site.mixer_args) | args
    if args.get("head_dim") is None:
        args.pop("head_dim", None)
    if "head_dim" in args and "num_heads" not in args:
        args = args | {"num_heads": max(site.dim // args["head_dim"], 1)}
    elif "num_heads" in args and "head_dim" not in args:
        args = args | {"head_dim": None}
    settings: dict[str, Any] = {
        "num_heads": site.num_heads,
        "head_dim": site.head_dim,
        "feat_size": site.feat_size,
        "num_prefix_tokens": site.num_prefix_tokens,
        "qkv_bias": site.with_qkv_bias,
        "proj_bias": site.with_proj_bias,
        "attn_drop": site.attn_drop,
        "proj_drop": site.proj_drop,
        "device": like.device,
        "dtype": like.dtype,
    }
    try:
        check_arguments(MIXERS[mixer].__init__, args)
    except StaticKeyError as error:
        raise StaticKeyError(f"mixer {mixer!r}: {error}") from error
    try:
        new = MIXERS[mixer](site.dim, **(settings | args))
    except TypeError as error:
        keyed = [name for name in ("key", "key_size", "off_grid") if name in args]
        if keyed and not has_static_key(MIXERS[mixer]):
            raise StaticKeyError(
                f"mixer {mixer!r} has no static key, so no {', '.join(keyed)}; leave it out, or choose ska, cska "
                "or fcska"
            ) from None
        raise StaticKeyError(f"mixer {mixer!r}: {error}") from None
    new.input_fmt = site.input_fmt
    _fit_projections(name, site, mixer, new)
    _initialise(new, site, seed)
    _keep_parts(name, site, mixer, new)
    if keep_weights and site.qkv_weight is not None:
        _carry_over(name, site, new)
    return new


def _fit_projections(name: str, site: Site, mixer: str, new: TokenMixer) -> None:
    """Give the mixer's projections the widths, and the batch norms behind them, that those of the host have."""
    out_dim = site.dim if site.out_dim is None else site.out_dim
    value_dim = site.head_dim if site.value_dim is None else site.value_dim
    heads = (site.num_heads, site.head_dim) == (new.num_heads, new.head_dim)
    if site.with_proj and out_dim == site.dim and (value_dim == site.head_dim or not heads):
        pass
    elif isinstance(new, AttentionMixer) and heads and not isinstance(new, SharedKeyValueAttention):
        new.set_widths(value_dim, out_dim if site.with_proj else None)
    else:
        raise UnsupportedHostError(
            f"{name} has heads of {site.head_dim} with values of {value_dim} and {out_dim} of {site.dim} channels at "
            f"its end, for which mixer {mixer!r} of {new.num_heads} heads of {new.head_dim} has no place"
        )
    if site.reduction is not None:
        if not isinstance(new, AttentionMixer):
            raise UnsupportedHostError(f"{name} takes keys from fewer tokens, for which mixer {mixer!r} has no place")
        new.set_reduction(site.reduction)
    for target, norm in {
        "qkv": site.qkv_norm,
        "qv": site.qkv_norm,
        "k": site.qkv_norm,
        "v": site.qkv_norm,
        "proj": site.proj_norm,
    }.items():
        linear = getattr(new, target, None)
        if isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(new, target, NormedLinear(linear, norm))


def _initialise(mixer: TokenMixer, site: Site, seed: int) -> None:
    """Draw each projection from a seed of its own name, so that mixers share those they both have."""
    for name, module in mixer.named_children():
        if isinstance(module, Reduction):
            continue  # the host's
        torch.manual_seed(seed ^ zlib.crc32(name.encode()))
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()
            if site.init_weights is not None:
                site.init_weights(part)
    torch.manual_seed(seed)
    own_reset = getattr(mixer, "reset_parameters", None)
    if own_reset is not None:
        own_reset()


def _keep_parts(name: str, site: Site, mixer: str, new: TokenMixer) -> None:
    """Move copies of the norms, the gate and the head mixing of the host into the mixer."""
    kept = {name: getattr(site, name) for name in ("q_norm", "out_norm", "head_mix", "gate", "query_bias")}
    kept = {part: module for part, module in kept.items() if not isinstance(module, nn.Identity | None)}
    parts = [*kept, *(["a position bias"] if site.needs_map else [])]
    if site.rotate_half is not None:
        parts.append("a rotary position embedding")
    if (parts and not isinstance(new, AttentionMixer)) or (site.rotate_half is not None and not new.rotates):
        raise UnsupportedHostError(f"{name} has {', '.join(parts)}, for which mixer {mixer!r} has no place")
    if site.adds_pos_embed and not new.adds_pos_embed:
        raise UnsupportedHostError(
            f"{name} adds a position embedding to its queries and keys alone, for which mixer {mixer!r} has no place"
        )
    if parts and (new.num_heads, new.head_dim) != (site.num_heads, site.head_dim):
        raise StaticKeyError(
            f"{name} has {', '.join(parts)} for {site.num_heads} heads of {site.head_dim}, the mixer has "
            f"{new.num_heads} of {new.head_dim}; keep the host's heads"
        )
    if isinstance(new, AttentionMixer) and site.rotate_half is not None:
        new.rotate_half = site.rotate_half
        if isinstance(new, StaticKeyAttention) and (new.key_size is not None or new.off_grid != "resample"):
            raise StaticKeyError(
                f"{name} has a rotary position embedding, which turns each key by the place of its token: it takes "
                f"key_size=None and off_grid='resample', not {new.key_size} and {new.off_grid!r}"
            )
    if isinstance(new, PartlyStaticAttention) and new.mixed:
        reasons = {
            "a position bias that queries make": site.query_bias is not None,
            "fewer keys than tokens": site.reduction is not None,
            f"one query of {site.tokens_per_query} tokens": site.tokens_per_query > 1,
        }
        met = [reason for reason, holds in reasons.items() if holds]
        if met:
            raise UnsupportedHostError(
                f"{name} has {', '.join(met)}, which dynamic_heads and bias='map' have no place for; use ska"
            )
    for part, module in kept.items():
        setattr(new, part, deepcopy(module))
    if site.reduction is not None and isinstance(new, AttentionMixer):
        new.reduction = deepcopy(site.reduction)
    if site.tokens_per_query > 1:
        if not isinstance(new, AttentionMixer) or hasattr(new, "kernel_size"):
            raise UnsupportedHostError(
                f"{name} makes one query of {site.tokens_per_query} tokens, for which mixer {mixer!r} has no place; "
                "name the other layers, or use ska"
            )
        new.tokens_per_query = site.tokens_per_query
    if isinstance(new, SelfAttention | PartlyStaticAttention) and site.k_norm is not None:
        new.k_norm = deepcopy(site.k_norm)
    if isinstance(new, AttentionMixer) and new.log_temperature is not None and site.log_temperature is not None:
        new.log_temperature = nn.Parameter(
            site.log_temperature.detach().clone(), requires_grad=site.log_temperature.requires_grad
        )


@torch.no_grad()
def _carry_over(name: str, site: Site, mixer: TokenMixer) -> None:
    """Copy the rows of the host's qkv that the mixer has too, and the output projection; what is frozen stays so."""
    heads = (mixer.num_heads, mixer.head_dim)
    if heads != (site.num_heads, site.head_dim):
        raise StaticKeyError(
            f"{name}: the host has {site.num_heads} heads of {site.head_dim}, the mixer {heads[0]} of {heads[1]}; "
            "weights cannot be carried over: keep the host's heads, or pass keep_weights=False"
        )
    values = site.num_heads * (site.head_dim if site.value_dim is None else site.value_dim)
    inner = site.num_heads * site.head_dim
    for target_name, parts in {"qkv": (0, 1, 2), "qv": (0, 2), "k": (1,), "v": (2,)}.items():
        target = getattr(mixer, target_name, None)
        if target is None:
            continue
        for tensor, source in {"weight": site.qkv_weight, "bias": site.qkv_bias}.items():
            if source is None:
                if getattr(target, tensor) is not None:
                    nn.init.zeros_(getattr(target, tensor))  # a bias the host does not have
            else:
                rows = torch.cat([source.split_with_sizes([inner, inner, values])[part] for part in parts])
                if target_name == "k" and isinstance(mixer, PartlyStaticAttention):
                    rows = rows[mixer.key_channels()]
                _copy(f"{name}.{target_name}.{tensor}", rows, getattr(target, tensor), source.requires_grad)
        if site.qkv_norm is not None and isinstance(target, NormedLinear):
            for tensor, own in target.norm.state_dict(keep_vars=True).items():
                source = getattr(site.qkv_norm, tensor)
                trainable = source.requires_grad
                if source.ndim:
                    source = torch.cat([source.split_with_sizes([inner, inner, values])[part] for part in parts])
                    if target_name == "k" and isinstance(mixer, PartlyStaticAttention):
                        source = source[mixer.key_channels()]
                _copy(f"{name}.{target_name}.norm.{tensor}", source, own, trainable)
    proj: Any = getattr(mixer, "proj", None)
    if isinstance(proj, NormedLinear) and site.proj_norm is not None:
        for tensor, own in proj.norm.state_dict(keep_vars=True).items():
            source = getattr(site.proj_norm, tensor)
            _copy(f"{name}.proj.norm.{tensor}", source, own, source.requires_grad)
    if proj is not None and site.proj is not None:
        for tensor in ("weight", "bias"):
            if getattr(site.proj, tensor) is not None:
                source = getattr(site.proj, tensor)
                trainable = source.requires_grad
                source = source.flatten(1) if tensor == "weight" else source
                _copy(f"{name}.proj.{tensor}", source, getattr(proj, tensor), trainable)
            elif getattr(proj, tensor) is not None:
                nn.init.zeros_(getattr(proj, tensor))


def _copy(name: str, source: torch.Tensor, target: torch.Tensor | None, trainable: bool) -> None:
    if target is None or target.shape != source.shape:
        shape = None if target is None else tuple(target.shape)
        raise StaticKeyError(
            f"{name}: {tuple(source.shape)} in the host, {shape} in the mixer; keep the host's heads and biases "
            "in mixer_args, or pass keep_weights=False"
        )
    target.copy_(source)
    if isinstance(target, nn.Parameter):
        target.requires_grad_(trainable)


def _num_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
