"""Gradients of an operation from torch's own operations, for what a backward pass of our own cannot answer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def needs_differentiable_backward(grad_out: Tensor) -> bool:
    """Whether a backward pass must consist of differentiable operations: for ``create_graph``, or under vmap."""
    batched = torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad_out)
    return batched or torch.is_grad_enabled()


def recomputed_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad_out: Tensor
) -> tuple[Tensor | None, ...]:
    """Run ``function`` again and differentiate it, inside the backward pass of an ``autograd.Function``.

    Where gradients are enabled, as ``create_graph=True`` has it, the result can be differentiated again.

    Args:
        function: The operation, in differentiable torch operations, of all ``inputs``.
        inputs: Its tensors, as the forward pass had them.
        needed: Whether the gradient of each input is wanted.
        grad_out: Gradient of the output.

    Returns:
        A gradient for every input, None where none is needed.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: one input may be made from another, whose gradient must not hold that of the first
        views = [None if x is None else x.view_as(x) for x in inputs]
        out = function(*views)
    wanted = [view for view, wants in zip(views, needed, strict=True) if view is not None and wants]
    grads = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=create_graph))
    return tuple(
        next(grads) if view is not None and wants else None for view, wants in zip(views, needed, strict=True)
    )
