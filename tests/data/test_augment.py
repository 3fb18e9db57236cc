import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from torchvision.transforms.v2 import functional as TF

from statickey.data.augment import BatchAugment, Draws, shifted_crop
from statickey.data.randaugment import OPS, parse_policy
from statickey.errors import DataError, StaticKeyError

POLICY = "rand-m9-n2-mstd0.5-inc1"
EVERYTHING = {"crop_padding": 3, "flip": True, "policy": POLICY}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count=8, chans=3, height=13, width=17, seed=0):
    """Smooth enough for interpolation, rough enough to tell pixels apart, and not over the full range."""
    coarse = torch.rand(count, chans, 5, 5, generator=generator(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth * 180 + 30).clamp(0, 255).to(torch.uint8)


def apply_op(name, images, strengths):
    ops = torch.full((len(images), 1), OPS.index(name))
    draws = Draws(ops=ops, strengths=torch.tensor(strengths).view(-1, 1))
    return BatchAugment(policy="rand-m9-n1")(images, draws)


def as_pil(image):
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def as_tensor(image):
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


def geometry(image):
    return {"fillcolor": 128 if image.mode == "L" else (128,) * 3, "resample": Image.Resampling.BILINEAR}


PILLOW = {
    "AutoContrast": lambda image, s: timm_ops.auto_contrast(image),
    "Equalize": lambda image, s: timm_ops.equalize(image),
    "Invert": lambda image, s: timm_ops.invert(image),
    "Posterize": lambda image, s: timm_ops.posterize(image, 8 - round(4 * abs(s))),
    "Solarize": lambda image, s: timm_ops.solarize(image, 256 - int(256 * abs(s))),
    "Color": lambda image, s: timm_ops.color(image, max(0.1, 1 + 0.9 * s)),
    "Contrast": lambda image, s: timm_ops.contrast(image, max(0.1, 1 + 0.9 * s)),
    "Brightness": lambda image, s: timm_ops.brightness(image, max(0.1, 1 + 0.9 * s)),
    "Sharpness": lambda image, s: timm_ops.sharpness(image, max(0.1, 1 + 0.9 * s)),
    "Rotate": lambda image, s: timm_ops.rotate(image, 30 * s, **geometry(image)),
    "ShearX": lambda image, s: timm_ops.shear_x(image, 0.3 * s, **geometry(image)),
    "ShearY": lambda image, s: timm_ops.shear_y(image, 0.3 * s, **geometry(image)),
    "TranslateX": lambda image, s: timm_ops.translate_x_rel(image, 0.45 * s, **geometry(image)),
    "TranslateY": lambda image, s: timm_ops.translate_y_rel(image, 0.45 * s, **geometry(image)),
}
TORCHVISION = {
    "AutoContrast": lambda image, s: TF.autocontrast(image),
    "Equalize": lambda image, s: TF.equalize(image),
    "Invert": lambda image, s: TF.invert(image),
    "Posterize": lambda image, s: TF.posterize(image, 8 - round(4 * abs(s))),
    "Solarize": lambda image, s: TF.solarize(image, 256 - int(256 * abs(s))),
    "Color": lambda image, s: TF.adjust_saturation(image, max(0.1, 1 + 0.9 * s)),
    "Brightness": lambda image, s: TF.adjust_brightness(image, max(0.1, 1 + 0.9 * s)),
    "Contrast": lambda image, s: TF.adjust_contrast(image, max(0.1, 1 + 0.9 * s)),
    "Sharpness": lambda image, s: TF.adjust_sharpness(image, max(0.1, 1 + 0.9 * s)),
}
STRENGTHS = [0.03, -0.21, 0.45, -0.57, 0.71, -0.86, 0.93, -1.0]


def farthest(ours, reference):
    return int((ours.int() - reference.int()).abs().max())


def test_every_op_has_a_reference():
    assert set(OPS) == set(PILLOW)


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize("name", OPS)
def test_op_is_pillows(name, chans):
    images = noise(chans=chans)
    out = apply_op(name, images, STRENGTHS)
    assert out.dtype == torch.uint8
    for image, ours, strength in zip(images, out, STRENGTHS, strict=True):
        reference = image if (name, chans) == ("Color", 1) else as_tensor(PILLOW[name](as_pil(image), strength))
        assert farthest(ours, reference) <= 1, strength


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize("name", TORCHVISION)
def test_op_is_torchvisions(name, chans):
    images = noise(chans=chans, height=9, width=7, seed=1)
    out = apply_op(name, images, STRENGTHS)
    for image, ours, strength in zip(images, out, STRENGTHS, strict=True):
        assert farthest(ours, TORCHVISION[name](image, strength)) <= 1, strength


@pytest.mark.parametrize("name", OPS)
def test_op_leaves_its_input_and_tiny_or_flat_images_alone(name):
    images = noise(2, height=2, width=1)
    before = images.clone()
    assert apply_op(name, images, [1.0, -1.0]).shape == images.shape
    assert torch.equal(images, before)
    flat = torch.full((1, 3, 6, 5), 77, dtype=torch.uint8)
    if name in ("AutoContrast", "Equalize", "Color", "Contrast", "Sharpness"):
        assert torch.equal(apply_op(name, flat, [0.9]), flat)


def test_solarize_and_posterize_at_the_ends():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(apply_op("Solarize", images, [0.0]), images)
    assert torch.equal(apply_op("Solarize", images, [1.0]), ~images)
    assert torch.equal(apply_op("Posterize", images, [0.0]), images)
    assert torch.equal(apply_op("Posterize", images, [-1.0]), images & 0xF0)


@pytest.mark.parametrize("chans", [1, 3])
def test_images_and_seeds_differ_and_a_seed_repeats(chans):
    augment = BatchAugment(**EVERYTHING)
    images = noise(1, chans).repeat(64, 1, 1, 1)
    first, again, other = (augment(images, augment.draw(64, generator(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({x.numpy().tobytes() for x in first}) > 55


@pytest.mark.parametrize("index", [slice(0, 5), slice(31, 64), torch.tensor([40, 3, 17]), slice(7, 8), slice(0, 0)])
def test_rows_do_not_depend_on_the_rest_of_the_batch(index):
    augment = BatchAugment(**EVERYTHING)
    images = noise(64, height=32, width=31)
    draws = augment.draw(64, generator())
    assert torch.equal(augment(images[index], draws.rows(index)), augment(images, draws)[index])


def test_crop_and_mirror_are_drawn_before_the_policy():
    plain, full = BatchAugment(crop_padding=3, flip=True), BatchAugment(**EVERYTHING)
    first, second = plain.draw(9, generator()), full.draw(9, generator())
    reference = generator()
    offsets = torch.randint(0, 7, (2, 9, 1), generator=reference)
    mirrored = torch.rand(9, generator=reference) < 0.5
    for draws in (first, second):
        assert torch.equal(draws.offsets, offsets.squeeze(2).T)
        assert torch.equal(draws.mirrored, mirrored)
    images = noise(9)
    padded = torch.nn.functional.pad(images, (3,) * 4)
    for i, out in enumerate(plain(images, first)):
        row, col = (int(x) for x in offsets[:, i, 0])
        cut = padded[i, :, row : row + 13, col : col + 17]
        assert torch.equal(out, cut.flip(-1) if mirrored[i] else cut)


def test_crop_shifts_by_whole_pixels():
    images = noise(2, height=4, width=6)
    out = shifted_crop(images, torch.tensor([[2, 2], [0, 3]]), 2)
    assert torch.equal(out[0], images[0])
    assert torch.equal(out[1, :, 2:, :5], images[1, :, :2, 1:])
    assert not out[1, :, :2].any()
    assert not out[1, :, :, 5].any()


def test_nothing_to_do_draws_nothing():
    augment = BatchAugment(policy="none")
    source, images = generator(), noise()
    assert augment(images, augment.draw(8, source)) is images
    assert torch.equal(source.get_state(), generator().get_state())


def test_policy_draws_follow_its_numbers():
    draws = BatchAugment(policy="rand-m4-n3-mstd0.5").draw(4000, generator())
    assert draws.ops.shape == draws.strengths.shape == (4000, 3)
    assert (draws.ops < 0).float().mean() == pytest.approx(0.5, abs=0.02)
    counts = torch.bincount(draws.ops[draws.ops >= 0], minlength=len(OPS)).float()
    assert counts.min() > 0.8 * counts.mean()
    assert draws.strengths.mean() == pytest.approx(0, abs=0.02)
    assert draws.strengths.abs().mean() == pytest.approx(0.4, abs=0.01)
    assert draws.strengths.abs().std() == pytest.approx(0.05, abs=0.01)
    assert BatchAugment(policy="rand-m10-mstd3").draw(4000, generator()).strengths.abs().max() == 1
    steady = BatchAugment(policy="rand-m4").draw(50, generator()).strengths.abs()
    assert torch.equal(steady, torch.full_like(steady, 0.4))


def test_policies_are_read_in_any_order():
    assert parse_policy(POLICY) == parse_policy("rand-inc1-mstd0.50-n2-m9") == (9, 2, 0.5)
    assert parse_policy("rand-m0") == (0, 2, 0.0)
    assert parse_policy("none") is parse_policy(None) is None
    assert str(parse_policy("rand-m7-n1")) == "rand-m7-n1-mstd0-inc1"


REFUSED = {
    "rand": "'rand' is not known; write rand-mM",
    "": "policy '' is not known",
    "augmix-m5-w4": "'augmix-m5-w4' has 'w4'; write rand-mM",
    "v0": "'v0' is not known",
    "rand-m9-p1": "has 'p1'",
    "rand-m9-m8": "has 'm8'",
    "rand-m-9": "has 'm'",
    "rand-m11": "m must be a whole number from 0 to 10",
    "rand-m9.5": "m must be a whole number",
    "rand-m9-n0": "n one from 1",
    "rand-m9-inc0": "has 'inc0', but severity grows with m here; write inc1",
}


@pytest.mark.parametrize("policy", REFUSED)
def test_refuses_policies(policy):
    with pytest.raises(DataError, match=REFUSED[policy]):
        BatchAugment(policy=policy)


def test_refuses_images_and_draws_that_do_not_fit():
    augment = BatchAugment(flip=True)
    with pytest.raises(StaticKeyError, match="crop_padding=-1 must be zero or a positive integer"):
        BatchAugment(crop_padding=-1)
    with pytest.raises(DataError, match=r"images \(8, 3, 13, 17\) in torch.float32 must be"):
        augment(noise().float(), augment.draw(8, generator()))
    with pytest.raises(DataError, match="5 draws for 8 images; take their rows"):
        augment(noise(), augment.draw(5, generator()))


@pytest.mark.gpu
def test_device_gives_the_same_without_waiting():
    augment = BatchAugment(**EVERYTHING)
    images, draws = noise(64), augment.draw(64, generator())
    on_device = images.cuda()
    augment(on_device, draws)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augment(on_device, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert farthest(out.cpu(), augment(images, draws)) <= 1
