"""Type aliases shared by every layer of the package."""

from typing import Literal, TypeAlias

Size2: TypeAlias = tuple[int, int]
"""(H, W) in tokens or pixels; the name of the variable says which."""

Backend: TypeAlias = Literal["sdpa", "math", "triton"]
"""How the op computes attention."""

Key: TypeAlias = Literal["grid", "continuous"]
"""A static key with a row for each position of a grid, or a function of position."""

OffGrid: TypeAlias = Literal["resample", "window", "pool"]
"""What a layer does on a grid its key was not built for."""

InputFmt: TypeAlias = Literal["NLC", "NHWC", "NCHW"]
"""Tokens (batch, tokens, channels), or maps of them with the channels last or first."""
