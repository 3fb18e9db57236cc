"""What every conversion of a host must do; each check leaves the host alone."""

import copy
import pickle

import torch
from torch import nn

from statickey import convert
from tolerances import assert_close


def unsettle(model):
    """Leave no parameter or statistic at a value that hides a mistake."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "bias" in name or "rel_pos" in name or "gamma" in name:
            nn.init.normal_(parameter, mean=0.3, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
        if hasattr(module, "attention_bias_cache"):
            module.attention_bias_cache = {}


def keeps_function(model, images):
    """Self-attention in its place gives the host's outputs, and can be swapped again as the host can."""
    swapped, static = copy.deepcopy(model), copy.deepcopy(model)
    report = convert(swapped, "mhsa")
    assert report.macs_after == report.macs_before > 0
    with torch.no_grad():
        assert_close("logits", swapped(images), model(images))
        twice = pickle.loads(pickle.dumps(swapped))
        convert(twice, "ska")
        convert(static, "ska")
        assert_close("converted twice", twice(images), static(images))


def trains_static_keys(model, images):
    """Every parameter gets a finite gradient that gets one in the host; the converted model is returned."""
    host, static = copy.deepcopy(model).train(), copy.deepcopy(model)
    total(host(images)).backward()
    untrained = {name for name, parameter in host.named_parameters() if parameter.grad is None}
    convert(static, "ska")
    total(static.train()(images)).backward()
    grads = {name: parameter.grad for name, parameter in static.named_parameters() if name not in untrained}
    assert not [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]
    assert [name for name in static.no_weight_decay() if name.endswith("static_key")]
    return static.eval()


def follows_size(model, static, size):
    """Self-attention gives the outputs of the host at another size; static keys are resampled, and run."""
    host, swapped, images = copy.deepcopy(model), copy.deepcopy(model), torch.randn(1, 3, *size)
    convert(swapped, "mhsa")
    for follower in (host, swapped, static):
        if hasattr(follower, "set_input_size"):
            follower.set_input_size(size)
    with torch.no_grad():
        if hasattr(host, "set_input_size") or not hasattr(host, "pos_embed"):  # else only what it became follows
            assert_close("at another size", swapped.eval()(images), host.eval()(images))
        assert swapped(images).isfinite().all()
        assert static(images).isfinite().all()


def total(out):
    """The sum of squares of all tensors of an output."""
    return sum(part.square().mean() for part in (out if isinstance(out, tuple | list) else [out]))
