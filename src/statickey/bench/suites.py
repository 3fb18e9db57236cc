"""The suites: which contenders are measured, against what, and what the ratios are to be at most."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from .._files import explained_read, read_json, read_yaml
from ..layers import MIXERS, StaticKeyAttention
from ..models import Swap
from .contender import (
    PLAIN_CSKA,
    TIMM_MHSA,
    Contender,
    LayerShape,
    Targets,
    layer,
    mask_rcnn,
    model,
    network,
    op,
)

LAYERS = (
    LayerShape((14, 14), 384, 6, num_prefix_tokens=1),
    LayerShape((28, 28), 128, 8),
    LayerShape((14, 14), 320, 10),
    LayerShape((14, 14), 320, 20),
    LayerShape((7, 7), 512, 16),
)
FCSKA_TARGETS = Targets(1.20, 1.30)
FORMER_TARGETS = {"fcska": Targets(1.08, 1.12), "ska:key_size=[7,7]": Targets(1.00, 1.00)}
LAYER_TARGETS = {
    (LAYERS[0], "ska"): Targets(0.85, 0.88),
    (LAYERS[1], "cska"): Targets(0.35, 0.50, memory=0.30),
    (LAYERS[1], "ska:key_size=[7,7]"): Targets(0.35, 0.40),
    (LAYERS[2], "ska"): Targets(0.85, 0.90),
    (LAYERS[2], "ska:key=continuous"): Targets(0.88, 0.92),
    (LAYERS[3], "cska"): Targets(0.80, 0.80),
    (LAYERS[4], "ska"): Targets(0.85, 0.90),
}
SIDES, WIDTHS, BATCHES = (4, 7, 8, 14, 16, 28, 32), (16, 24, 32, 48, 64), (1, 8, 64)
"""Of the grid of shapes: tokens along a side, channels of a head, of which as many as make at most 256, images."""
MOST_MAP_BYTES = 1 << 29
"""Largest float32 map in the grid of shapes; the plain convolution needs several times as much memory."""
RESOLUTIONS = (224, 384, 512, 768, 1024, 1536)
KERNEL = ", triton"
"""What is added to the name of a mixer that runs with the kernel."""
STRIDE, BUILT_FOR = 8, (28, 28)
"""The second stage of a MetaFormer, built for images of 224 pixels."""
DETECTOR = LayerShape((100, 136), 128, 8, batch=1)
"""That stage on a detector's image of 800 x 1088 pixels."""
DETECTOR_IMAGES = ((168, 224), (384, 512), (600, 800), (800, 1066), (1000, 1333))
LONGEST_RESAMPLED = 1066
"""Pixels along an image up to which keys for all tokens are measured."""
BATCHED = {"layers", "models", "training"}
"""Suites whose number of images may be chosen."""


def layers(mixers: Sequence[str], kernel: bool = False, batch: int | None = None) -> list[Contender]:
    """Attention layers at the shapes of ViT-S and of the stages of a MetaFormer.

    Args:
        mixers: Names of token mixers.
        kernel: Measure static keys with the op's Triton kernel too, against themselves without.
        batch: Images; default 8.
    """
    rows = []
    for built in LAYERS:
        shape = built if batch is None else replace(built, batch=batch)

        def row(name: str, against: str | None, shape: LayerShape = shape, **options: Any) -> Contender:
            return Contender(str(shape), name, partial(layer, shape, name), against, **options)

        with_plain = "cska" in mixers and not shape.num_prefix_tokens
        rows.append(row(TIMM_MHSA, None))
        if with_plain:
            rows.append(row(PLAIN_CSKA, None))
        for mixer in mixers:
            against = {"cska": PLAIN_CSKA if with_plain else TIMM_MHSA, "fcska": "ska"}.get(mixer, TIMM_MHSA)
            if against == "ska" and "ska" not in mixers:
                against = TIMM_MHSA
            targets = FCSKA_TARGETS if against == "ska" else LAYER_TARGETS.get((shape, mixer), Targets())
            twin = partial(layer, shape, PLAIN_CSKA) if against == PLAIN_CSKA else None
            rows.append(row(mixer, against, targets=targets, twin=twin))
            made = MIXERS[Swap.name_in(mixer)]
            if kernel and isinstance(made, type) and issubclass(made, StaticKeyAttention):
                make = partial(layer, shape, mixer, backend="triton")
                rows.append(Contender(str(shape), f"{mixer}{KERNEL}", make, mixer))
    return rows


def models(mixers: Sequence[str], batch: int = 8) -> list[Contender]:
    """Whole networks against timm's."""
    rows = []
    vit, former = "vit_small_patch16_224", "caformer_s18"
    group = f"ViT-S, 224 pixels, batch {batch}"
    rows.append(Contender(group, vit, partial(model, vit, batch)))
    swaps = [Swap.parse(mixer) for mixer in mixers]
    for swap in swaps:
        targets = Targets(0.93, 0.95) if str(swap) == "ska" else Targets()
        name = f"{swap.mixer}_{vit}"
        make = partial(model, name, batch, mixer_args=dict(swap.mixer_args))
        rows.append(Contender(group, _named(name, swap), make, vit, targets=targets))
    group = f"MetaFormer S18, 224 pixels, batch {batch}"
    rows.append(Contender(group, former, partial(model, former, batch)))
    for swap in swaps:
        name = f"{swap.mixer}former_s18"
        if str(swap) == "cska":
            plain_name = f"{name}, plain convolution"
            plain = partial(model, name, batch, plain_cska=True)
            rows.append(Contender(group, plain_name, plain, former))
            rows.append(
                Contender(
                    group, name, partial(model, name, batch), plain_name, targets=Targets(0.50, 0.60), twin=plain
                )
            )
        else:
            targets = FORMER_TARGETS.get(str(swap), Targets())
            make = partial(model, name, batch, mixer_args={swap.mixer: dict(swap.mixer_args)})
            rows.append(Contender(group, _named(name, swap), make, former, targets=targets))
    return rows


def _named(model_name: str, swap: Swap) -> str:
    return model_name + str(swap).removeprefix(swap.mixer)


def resolution(mixers: Sequence[str]) -> list[Contender]:
    """The second stage's layer from 224 to 1536 pixels, built for 224, against attention to all: per token.

    Mixers tile the map with windows unless their arguments say otherwise.
    """
    rows = []
    for size in RESOLUTIONS:
        shape = LayerShape((size // STRIDE, size // STRIDE), 128, 8, batch=1)
        for name in (TIMM_MHSA, *mixers):
            built_for = None if name == TIMM_MHSA else BUILT_FOR
            first = size == RESOLUTIONS[0]
            whole = name == TIMM_MHSA or Swap.parse(name).mixer_args.get("off_grid") == "resample"
            rows.append(
                Contender(
                    "stage 2 (stride 8, 128 channels, 8 heads), one image of so many pixels, ratios per token",
                    f"{name} {size}",
                    partial(layer, shape, name, built_for),
                    None if first else f"{name} {RESOLUTIONS[0]}",
                    units=shape.num_tokens,
                    checked=first or not whole,
                    targets=Targets(1.15) if (name, size) == ("cska", 1024) else Targets(),
                )
            )
    return rows


def detector(mixers: Sequence[str]) -> list[Contender]:
    """The second stage's layer on a detector's image: mixers whose keys have a grid of their own."""
    group = str(DETECTOR)
    rows = [Contender(group, TIMM_MHSA, partial(layer, DETECTOR, TIMM_MHSA), checked=False)]
    for mixer in mixers:
        if Swap.parse(mixer).mixer_args.get("key_size") is not None:
            targets = Targets(0.03, 0.03, memory=1.0) if mixer == "ska:key_size=[7,7]" else Targets()
            rows.append(Contender(group, mixer, partial(layer, DETECTOR, mixer), TIMM_MHSA, targets=targets))
    return rows


def detectors(mixers: Sequence[str]) -> list[Contender]:
    """Mask R-CNN on a MetaFormer S18 whose second stage has these mixers, from 224 pixels on the longer side to 1333.

    Keys are built for 224 pixels, and average values over their grid unless their arguments say otherwise; those that
    attend to all tokens are left out where that would take more memory than machines have.
    """
    rows = []
    for height, width in DETECTOR_IMAGES:
        group = f"Mask R-CNN, S18, one image of {height}x{width}"
        make = partial(mask_rcnn, "caformer_s18", None, (height, width))
        rows.append(Contender(group, "caformer_s18", make, checked=False))
        for mixer in mixers:
            if Swap.parse(mixer).mixer_args.get("off_grid") == "resample" and width > LONGEST_RESAMPLED:
                continue
            make = partial(mask_rcnn, "skaformer_s18", mixer, (height, width))
            rows.append(Contender(group, mixer, make, "caformer_s18", checked=False))
    return rows


def training(mixers: Sequence[str], compared: Path | None = None, batch: int | None = None) -> list[Contender]:
    """The network of a comparison, or the built-in one at 32 pixels, against itself with self-attention."""
    name = "small_vit"
    args: dict[str, Any] = {"img_size": 32, "num_classes": 10, "in_chans": 3, "model_args": {}}
    if compared is not None:
        name, args, as_compared = _compared(Path(compared))
        batch = as_compared if batch is None else batch
    batch = 64 if batch is None else batch
    group = f"{name}, {args['img_size']} pixels, batch {batch}"
    return [
        Contender(
            group,
            mixer,
            partial(network, name, mixer, batch=batch, **args),
            None if mixer == "mhsa" else "mhsa",
        )
        for mixer in ("mhsa", *(m for m in mixers if m != "mhsa"))
    ]


def _compared(folder: Path) -> tuple[str, dict[str, Any], int]:
    """The network of a folder of ``compare``: its name, arguments and batch size.

    Raises:
        OutputError: It is no such folder.
    """
    remedy = "give --compared a folder that compare has filled"
    config = read_yaml(folder / "config.yaml", remedy)
    card = read_json(next(folder.glob("runs/*/config.json"), folder / "runs"), remedy)
    with explained_read(folder, remedy):
        in_chans, _, img_size = card["pretrained_cfg"]["input_size"]
        args = {"img_size": img_size, "num_classes": card["num_classes"], "in_chans": in_chans}
        return str(config["model"]), args | {"model_args": dict(config["model_args"])}, int(config["batch_size"])


def shapes(mixers: Sequence[str]) -> list[Contender]:
    """CSKA's op against the same as the paper writes it, over grids, widths of heads and batches; no other mixer."""
    rows = []
    for side, width, batch in product(SIDES, WIDTHS, BATCHES):
        heads = 256 // width
        if 4 * batch * heads * side**4 > MOST_MAP_BYTES:
            continue
        shape = LayerShape((side, side), heads * width, heads, batch=batch)
        plain = partial(op, shape, plain=True)
        rows.append(Contender(str(shape), PLAIN_CSKA, plain, checked=False))
        targets = Targets(1.03, 1.03)
        rows.append(Contender(str(shape), "cska", partial(op, shape), PLAIN_CSKA, targets=targets, twin=plain))
    return rows


SUITES: dict[str, Callable[..., list[Contender]]] = {
    "layers": layers,
    "models": models,
    "resolution": resolution,
    "detector": detector,
    "detectors": detectors,
    "training": training,
    "shapes": shapes,
}
