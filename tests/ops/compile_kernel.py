"""Compile the Triton kernel as it is launched, for GPUs that need not be there. Triton's interpreter takes what
its compiler does not."""

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from statickey.ops import kernel

GPUS = (80, 90)
SHARED = 99 * 1024  # bytes that a block may have on every GPU since compute capability 8.0
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CASES = [  # type, query width, value width, kernel size, with bias, learned scale and border and without diagonal
    *((dtype, width, width, size, size > 1) for dtype in TYPES for width in (16, 64) for size in (1, 3)),
    (torch.bfloat16, 5, 3, 5, True),
    (torch.bfloat16, 576, 64, 1, False),
    (torch.bfloat16, 128, 200, 3, True),
    (torch.float32, 128, 200, 3, True),
]


class Recorder:
    """Stands in for the kernel."""

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, num_warps, num_stages, **constants):
        self.args, self.constants = args, constants
        self.options = {"num_warps": num_warps, "num_stages": num_stages}


def kind(arg):
    if isinstance(arg, torch.Tensor):
        return "*" + TYPES[arg.dtype]
    return "fp32" if isinstance(arg, float) else "i32"


def main():
    jitted, recorder = kernel._KERNEL, Recorder()
    assert not kernel.INTERPRETED
    kernel._KERNEL = recorder
    for dtype, width, value_width, size, everything in CASES:
        tokens = (6 + size) * (4 + size) if everything else 35
        query, key, value, bias = (
            torch.zeros(shape, dtype=dtype)
            for shape in (
                (2, 2, tokens, width),
                (2, 35, size**2 * width),
                (2, 2, 35, value_width),
                (2, 35),
            )
        )
        scale = torch.ones(()) if everything else 0.5
        bias, offset = (bias, 0) if everything else (None, None)
        kernel._launch(query, key, value, bias, scale, offset, ((7, 5), size) if size > 1 else None)
        given = dict(zip(jitted.arg_names, recorder.args, strict=False))
        constants = recorder.constants | {
            name: arg for name, arg in given.items() if arg is None or (type(arg) is int and arg == 1)
        }
        signature = {name: "constexpr" if name in constants else kind(arg) for name, arg in given.items()}
        signature |= dict.fromkeys(recorder.constants, "constexpr")
        aligned = [
            name
            for name, arg in given.items()
            if signature[name] not in ("constexpr", "fp32")
            if isinstance(arg, torch.Tensor) or arg % 16 == 0
        ]
        attrs = {(jitted.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(jitted, signature, constants, attrs)
        for gpu in GPUS:
            made = compile(source, target=GPUTarget("cuda", gpu, 32), options=recorder.options)
            assert made.metadata.shared <= SHARED, (gpu, dtype, width, value_width, size)


if __name__ == "__main__":
    main()
