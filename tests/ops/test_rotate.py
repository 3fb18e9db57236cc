import pytest
import torch
from timm.layers import apply_rot_embed_cat

from statickey.errors import StaticKeyError
from statickey.ops import reference, rotate
from tolerances import assert_close, assert_same_with_gradients

HEADS, TOKENS, WIDTH = 3, 6, 10


def embedding(angles, half):
    parts = [
        torch.cat([part, part], -1) if half else part.repeat_interleave(2, -1)
        for part in (angles.sin(), angles.cos())
    ]
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("half", [False, True], ids=["neighbours", "halves"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("leading", [(), (HEADS,), (2, 1)], ids=["shared", "each head", "each image"])
def test_is_a_product_of_complex_numbers(leading, prefix, half):
    x = torch.randn(2, HEADS, prefix + TOKENS, WIDTH, dtype=torch.float64)
    angles = torch.randn(*leading, TOKENS, WIDTH // 2, dtype=torch.float64)

    def ours(x, angles):
        return rotate(x, embedding(angles, half), half=half, num_prefix_tokens=prefix)

    def plain(x, angles):
        return reference.rotate(x, angles, half=half, num_prefix_tokens=prefix)

    assert_same_with_gradients(ours, plain, [x, angles])
    host = apply_rot_embed_cat(x[:, :, prefix:], embedding(angles, half), half=half)
    assert torch.equal(rotate(x, embedding(angles, half), half=half, num_prefix_tokens=prefix)[:, :, prefix:], host)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_type_and_turns_in_that_of_the_embedding(dtype):
    x, angles = torch.randn(1, 1, TOKENS, WIDTH), torch.randn(TOKENS, WIDTH // 2)
    out = rotate(x.to(dtype), embedding(angles, False))
    assert out.dtype == dtype
    assert torch.equal(out, rotate(x.to(dtype).float(), embedding(angles, False)).to(dtype))


@pytest.mark.parametrize("shape", [(TOKENS + 1, 2 * WIDTH), (TOKENS, WIDTH)])
def test_refuses_an_embedding_of_other_tokens(shape):
    with pytest.raises(StaticKeyError, match=rf"rope \({shape[0]}, {shape[1]}\) cannot turn 6 tokens of width 10"):
        rotate(torch.zeros(1, HEADS, TOKENS, WIDTH), torch.zeros(shape))


def test_refuses_an_odd_width():
    with pytest.raises(StaticKeyError, match="of an even width"):
        rotate(torch.zeros(1, HEADS, TOKENS, 5), torch.zeros(TOKENS, 10))


def test_logits_see_differences_of_places_only():
    query, key = torch.randn(2, 1, WIDTH, dtype=torch.float64).unbind(0)
    place = torch.randn(1, WIDTH // 2, dtype=torch.float64)

    def logit(shift):
        turned = [
            rotate(x, embedding(angle, True), half=True)
            for x, angle in ((query, place + shift), (key, -place + shift))
        ]
        return turned[0] @ turned[1].T

    assert_close("logit", logit(0.0), logit(1.7))
