"""RandAugment for whole batches in uint8: its notation, its draws, and its operations, different for every image.

It is timm's: every image gets ``n`` operations out of ``OPS``, drawn uniformly and with replacement, and each is
carried out with probability 0.5. At magnitude 10 they rotate by 30 degrees, shear by 0.3, shift by 0.45 of the side,
scale colour, contrast, brightness and sharpness by 0.1 or 1.9, invert every value (solarize) and keep 4 of 8 bits
(posterize; timm's keeps none, a black image). Geometry is bilinear.

Source:
    Cubuk et al., RandAugment, arXiv:1909.13719; levels as in ``timm.data.auto_augment``.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from ..errors import DataError

FILL = 128  # grey comes in where rotating, shearing and shifting uncover the frame, as in timm
POLICY_FORM = "rand-mM[-nN][-mstdS][-inc1], such as rand-m9-n2-mstd0.5-inc1"
_APPLY_PROB = 0.5


class RandPolicy(NamedTuple):
    """RandAugment's numbers: strength of the operations, how many an image gets, and the spread of the strength."""

    magnitude: int
    num_ops: int = 2
    magnitude_std: float = 0.0

    def __str__(self) -> str:
        return f"rand-m{self.magnitude}-n{self.num_ops}-mstd{self.magnitude_std:g}-inc1"


def parse_policy(policy: str | None) -> RandPolicy | None:
    """Read timm's notation of RandAugment.

    Args:
        policy: ``rand``, then in any order ``mM`` (magnitude, 0 to 10), ``nN`` (operations per image, default 2),
            ``mstdS`` (standard deviation of the magnitude, default 0) and ``inc1``, joined by dashes. Severity
            always grows with the magnitude, which timm calls ``inc1``: a policy without it means the same here,
            and ``inc0`` is refused. None and ``"none"`` mean no policy.

    Raises:
        DataError: The text is not of this form.
    """
    if policy is None or policy == "none":
        return None
    head, *sections = str(policy).split("-")
    values: dict[str, str] = {}
    for section in sections:
        match = re.fullmatch(r"(mstd|m|n|inc)(\d+(?:\.\d+)?)", section)
        if match is None or match[1] in values:
            raise DataError(f"policy {policy!r} has {section!r}; write {POLICY_FORM}, or none")
        values[match[1]] = match[2]
    if head != "rand" or "m" not in values:
        raise DataError(f"policy {policy!r} is not known; write {POLICY_FORM}, or none")
    if values.get("inc", "1") != "1":
        raise DataError(f"policy {policy!r} has 'inc{values['inc']}', but severity grows with m here; write inc1")
    whole = [values["m"], values.get("n", "2")]
    if not all(value.isdecimal() for value in whole) or int(whole[0]) > 10 or int(whole[1]) < 1:
        raise DataError(f"policy {policy!r}: m must be a whole number from 0 to 10 and n one from 1; {POLICY_FORM}")
    return RandPolicy(int(whole[0]), int(whole[1]), float(values.get("mstd", "0")))


def draw_ops(policy: RandPolicy, num_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Operations and their strengths, (num_images, n) each.

    Returns:
        Places in ``OPS``, or -1 for nothing, and magnitudes over 10 with a random sign, in [-1, 1].
    """
    shape = (num_images, policy.num_ops)
    ops = torch.randint(0, len(OPS), shape, generator=generator)
    ops[torch.rand(shape, generator=generator) >= _APPLY_PROB] = -1
    magnitude = torch.full(shape, float(policy.magnitude))
    if policy.magnitude_std:
        magnitude += policy.magnitude_std * torch.randn(shape, generator=generator)
    sign = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    return ops, sign * magnitude.clamp(0, 10) / 10


def apply_ops(images: Tensor, ops: Tensor, strengths: Tensor) -> None:
    """Carry out one operation per image, in place: the images of one operation at a time, the geometric as one."""
    order = torch.argsort(ops, stable=True)
    ops, strengths = ops[order], strengths[order]
    idle, *counts, geometric = torch.bincount(
        ops.clamp_max(len(_PIXEL_OPS)) + 1, minlength=len(_PIXEL_OPS) + 2
    ).tolist()
    index = order.to(images.device, non_blocking=True)
    own_strengths = strengths.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    start = idle
    for operate, count in zip(_PIXEL_OPS.values(), counts, strict=True):
        if count:
            chosen = index[start : start + count]
            images[chosen] = operate(images[chosen], own_strengths[start : start + count])
            start += count
    if geometric:
        chosen = index[start:]
        matrices = _matrices(ops[start:], strengths[start:], images.shape[2], images.shape[3])
        images[chosen] = _warp(images[chosen], matrices.to(images.device, non_blocking=True))


def _posterize(images: Tensor, strengths: Tensor) -> Tensor:
    dropped = (strengths.abs() * 4).round().to(torch.uint8)
    return images >> dropped << dropped


def _solarize(images: Tensor, strengths: Tensor) -> Tensor:
    threshold = 256 - (strengths.abs() * 256).to(torch.int16)
    bright = (images >= threshold.clamp_max(255).to(torch.uint8)) & (threshold < 256)
    return torch.where(bright, ~images, images)


def _color(images: Tensor, strengths: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else _enhance(images, _gray(images), strengths)


def _contrast(images: Tensor, strengths: Tensor) -> Tensor:
    gray = _gray(images)
    pixels = gray.shape[2] * gray.shape[3]
    mean = gray.sum((2, 3), keepdim=True).mul(2).add(pixels).div(2 * pixels, rounding_mode="floor")
    return _enhance(images, mean, strengths)


def _brightness(images: Tensor, strengths: Tensor) -> Tensor:
    return _enhance(images, torch.zeros_like(images[:, :1, :1, :1]), strengths)


def _sharpness(images: Tensor, strengths: Tensor) -> Tensor:
    if min(images.shape[2:]) < 3:
        return images
    values = images.float()
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[:, :, 1:-1, 1:-1]
    values[:, :, 1:-1, 1:-1] = total.div(13).round()
    return _enhance(images, values, strengths)


def _gray(images: Tensor) -> Tensor:
    """Luminance (B, 1, H, W) of images with 1 or 3 channels, in whole numbers as Pillow counts it."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = (images[:, i : i + 1].int() for i in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _enhance(images: Tensor, degenerate: Tensor, strengths: Tensor) -> Tensor:
    """Move images away from their degenerate versions, or towards them where the strength is negative."""
    factors = (1 + 0.9 * strengths).clamp_min(0.1)
    base = degenerate.float()
    return (base + (images - base) * factors).clamp(0, 255).to(torch.uint8)


_PIXEL_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda images, strengths: TF.autocontrast(images),
    "Equalize": lambda images, strengths: TF.equalize(images),
    "Invert": lambda images, strengths: ~images,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
}
_GEOMETRIC_OPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
OPS = (*_PIXEL_OPS, *_GEOMETRIC_OPS)


def _matrices(ops: Tensor, strengths: Tensor, height: int, width: int) -> Tensor:
    """Rows (a, b, c, d, e, f), (B, 6): the value at (x, y) comes from (a x + b y + c, d x + e y + f)."""
    rotate, shear_x, shear_y, shift_x, shift_y = (strengths.double() * (ops == OPS.index(n)) for n in _GEOMETRIC_OPS)
    cos, sin = torch.cos(rotate * -math.radians(30)), torch.sin(rotate * -math.radians(30))
    c = (1 - cos) * (width / 2) - sin * (height / 2) + 0.45 * width * shift_x
    f = sin * (width / 2) + (1 - cos) * (height / 2) + 0.45 * height * shift_y
    return torch.stack([cos, sin + 0.3 * shear_x, c, 0.3 * shear_y - sin, cos, f], dim=1).float()


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Sample images (B, C, H, W) bilinearly where their matrices (B, 6) point, grey outside."""
    height, width = images.shape[2:]
    a, b, c, d, e, f = matrices.view(-1, 6, 1, 1).unbind(1)
    x = torch.arange(width, device=images.device).add(0.5).view(1, 1, -1)
    y = torch.arange(height, device=images.device).add(0.5).view(1, -1, 1)
    # products and sums one by one: a matrix product or a fused sum may round differently in another batch
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    outside = (from_x < 0) | (from_x >= width) | (from_y < 0) | (from_y >= height)
    grid = torch.empty(*outside.shape, 2, device=images.device)
    grid[..., 0] = from_x * (2 / width) - 1
    grid[..., 1] = from_y * (2 / height) - 1
    values = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return values.round_().to(torch.uint8).masked_fill_(outside.unsqueeze(1), FILL)
