"""One table of tolerances for every parity test: relative and absolute, by type."""

import torch

TOLERANCES = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (3e-2, 3e-2),
    torch.float16: (4e-3, 4e-3),
}


def assert_close(name, actual, expected):
    rtol, atol = TOLERANCES[actual.dtype]
    torch.testing.assert_close(
        actual, expected.to(actual.dtype), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def assert_same_with_gradients(actual_fn, expected_fn, inputs):
    """Outputs and the gradient of every input agree, under one random cotangent."""
    results = []
    for fn in (actual_fn, expected_fn):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = fn(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results.append((out, torch.autograd.grad(out, leaves, weight)))
    (actual, grads), (expected, expected_grads) = results
    assert_close("output", actual, expected)
    for i, (grad, expected_grad) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_close(f"gradient of input {i}", grad, expected_grad)
