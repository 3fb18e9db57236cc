"""Which model ``convert`` works on: the one it is given, or the one that this wraps."""

from typing import NamedTuple

import torch
from timm.models._features import FeatureDictNet, FeatureHookNet
from torch import nn

from ..errors import UnsupportedHostError
from .host import HostRule, Site, find_rule, has_rule

_SHARED_OUT = ("DistributedDataParallel", "FullyShardedDataParallel")


class Host(NamedTuple):
    """A model that can be converted.

    Attributes: ``model``; ``rule``; ``sites``, by module name in the model that was asked about.
    """

    model: nn.Module
    rule: HostRule
    sites: dict[str, Site]


def find_host(model: nn.Module) -> Host:
    """The model itself, where a rule takes it, else the one inside it that a rule takes.

    Raises:
        UnsupportedHostError: None is taken, or several are; or what wraps it has noted its parameters.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if type(module).__name__ in _SHARED_OUT:
            inner = ".".join(part for part in ("model", name, "module") if part)
            raise UnsupportedHostError(
                f"{type(module).__name__} has noted the parameters it shares; convert {inner}, then wrap it again"
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedHostError(
            f"{type(model).__name__} is TorchScript, whose modules cannot be replaced; convert the model it was made "
            "of, and use torch.export in place of TorchScript"
        )
    try:
        rule = find_rule(model)
        return Host(model, rule, rule.sites(model))
    except UnsupportedHostError:
        inside = _hosts_inside(model) if isinstance(model, nn.Module) else {}
        if not inside:
            _refuse_flattened(model)
            raise
    if len(inside) > 1:
        found = ", ".join(f"{name} ({type(host).__name__})" for name, host in inside.items())
        raise UnsupportedHostError(
            f"{type(model).__name__} holds {len(inside)} models: {found}; convert the one you mean, such as "
            f"model.get_submodule({next(iter(inside))!r})"
        )
    ((name, inner_model),) = inside.items()
    host = find_host(inner_model)
    return host._replace(sites={f"{name}.{place}": site for place, site in host.sites.items()})


def _hosts_inside(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules below a model that there is a rule for, by name."""
    hosts: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if has_rule(child):
            hosts[name] = child
        else:
            hosts |= {f"{name}.{inner}": host for inner, host in _hosts_inside(child).items()}
    return hosts


def _refuse_flattened(model: nn.Module) -> None:
    """Say what to do about a model of features that holds the layers of a host, but not the host."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, FeatureDictNet | FeatureHookNet):
            raise UnsupportedHostError(
                f"{type(module).__name__} holds the layers of a model, not the model; build it with "
                "timm.create_model(..., features_only=True, feature_cls='getter'), which keeps the model and "
                "converts, or name a model of this package, such as skaformer_s18, in its place"
            )
