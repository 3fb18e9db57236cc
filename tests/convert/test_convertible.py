"""Every name of timm: it converts, runs and follows its size, or is refused for a reason; the table of both."""

import functools
from collections import Counter, defaultdict
from dataclasses import fields
from importlib.util import find_spec

import pytest
import timm
import torch
from timm.models import get_model_input_config

import statickey
from conversions import follows_size, keeps_function, trains_static_keys, unsettle
from statickey.convert import Site, attention_classes
from statickey.convert.host import refusal_reasons
from statickey.convert.wrappers import find_host
from statickey.errors import UnsupportedHostError

MODULES = sorted({timm.models._registry._model_to_module[name] for name in timm.list_models()})
MODULES = [module for module in MODULES if find_spec(f"timm.models.{module}")]  # not this package's own


LARGEST = 100_000_000
"""Parameters of the largest model that is run."""


def names_of(module):
    return [name for name in timm.list_models() if timm.models._registry._model_to_module[name] == module]


def kind(model):
    """What a model needs of a rule, or why it is refused; no attention is no reason."""
    try:
        _, _, sites = find_host(model)
    except UnsupportedHostError as error:
        if refusal_reasons(model):
            return None, refusal_reasons(model)
        found = attention_classes(model)
        known = type(error) is UnsupportedHostError and "is not a host" not in str(error)
        return None, str(error) if found and known else f"no rule for {', '.join(found)}" if found else ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    needs = {tuple(needed(site)) for site in sites.values() if site.is_attention}
    if not needs:
        return None, ""
    return (type(model), frozenset(needs)), None


def needed(site):
    yield type(site.module).__name__
    yield site.out_dim == site.dim
    yield site.value_dim == site.head_dim
    yield from sorted(site.mixer_args)
    yield type(getattr(site.wrap, "keywords", {}).get("rel_pos")).__name__
    for field in fields(Site):
        value = getattr(site, field.name)
        if isinstance(value, bool | torch.nn.Module) or field.name in ("num_prefix_tokens", "input_fmt"):
            yield field.name, value if isinstance(value, bool | int | str) else type(value).__name__


@functools.cache
def read(module):
    """The names of a module by kind, smallest first, and how many are refused for which reason."""
    kinds, why = defaultdict(list), Counter()
    for name in names_of(module):
        with torch.device("meta"):
            model = timm.create_model(name)
        found, reason = kind(model)
        if found is None:
            why[reason] += 1
        else:
            kinds[found].append((sum(parameter.numel() for parameter in model.parameters()), name))
    return [sorted(members) for members in kinds.values()], why


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_names_convert_or_are_refused_for_a_reason(module, rows):
    kinds, why = read(module)
    follow = set()
    for members in kinds:
        with torch.device("meta"):
            model = timm.create_model(members[0][1])
            statickey.convert(model, "ska")
        follow.add(hasattr(model, "set_input_size"))
    without = why[""]
    rows.append(
        {
            "module": module,
            "names": len(names_of(module)),
            "converted": sum(map(len, kinds)),
            "kinds": len(kinds),
            "size": "" if not follow else "yes" if follow == {True} else "no" if follow == {False} else "some",
            "without": without,
            "why": [f"{count}: {reason}" for reason, count in why.items() if reason],
        }
    )
    assert not any(reason.startswith("no rule for") for reason in why)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_the_smallest_of_each_kind_runs(module):
    for members in read(module)[0]:
        num_params, name = members[0]
        if num_params > LARGEST:
            continue
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5).eval()
        unsettle(model)
        size = get_model_input_config(model)["input_size"][1:]
        images = torch.randn(2, 3, *size)
        keeps_function(model, images)
        static = trains_static_keys(model, images)
        if hasattr(static, "set_input_size"):
            step = 32 if size[0] % 32 == 0 else 28 if size[0] % 28 == 0 else 16
            follows_size(model, static, (size[0], size[1] + 2 * step))
