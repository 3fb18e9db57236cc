"""Vision transformer blocks that are one projection in and one out, attention and perceptron side by side."""

from copy import deepcopy
from functools import partial
from typing import Any

from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from .._typing import Size2
from ..layers import TokenMixer
from .host import Site


class ParallelBlock(nn.Module):
    """Such a block with a mixer in it, and the perceptron's share of both projections.

    Args:
        mixer: The mixer.
        rest: What the host's block is made of beside it, by name.
    """

    def __init__(self, mixer: TokenMixer, rest: nn.ModuleDict) -> None:
        super().__init__()
        self.mixer = mixer
        self.rest = rest

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, dim) to the same."""
        rest, y = self.rest, self.rest["in_norm"](x)
        hidden = rest["mlp_drop"](rest["mlp_act"](rest["fc1"](y)))
        y = self.mixer(y, attn_mask=attn_mask, is_causal=is_causal) + rest["fc2"](hidden)
        return x + rest["drop_path"](rest["ls"](y))  # type: ignore[no-any-return]


def parallel_site(block: ParallelScalingBlock, feat_size: Size2, num_prefix_tokens: int) -> Site:
    """The site of a whole block, whose projections are taken apart."""
    mlp, dim = block.in_split[0], block.in_split[1]
    weight, bias = block.in_proj.weight, block.in_proj.bias
    fc1 = _linear(weight[:mlp], bias[:mlp] if block.mlp_bias is None else block.mlp_bias)
    if block.out_proj is None:
        proj, fc2 = block.attn_out_proj, deepcopy(block.mlp_out_proj)
    else:
        proj = _linear(block.out_proj.weight[:, :dim], block.out_proj.bias)
        fc2 = _linear(block.out_proj.weight[:, dim:], None)
    kept: dict[str, Any] = {
        name: getattr(block, name) for name in ("in_norm", "mlp_act", "mlp_drop", "ls", "drop_path")
    }
    rest = nn.ModuleDict(deepcopy(kept) | {"fc1": fc1, "fc2": fc2})
    return Site.of(
        block,
        feat_size=feat_size,
        num_prefix_tokens=num_prefix_tokens,
        qkv_weight=weight[mlp:],
        qkv_bias=None if bias is None else bias[mlp:],
        proj=proj,
        q_norm=block.q_norm,
        k_norm=block.k_norm,
        wrap=partial(ParallelBlock, rest=rest),
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear
