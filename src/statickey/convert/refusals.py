"""What mixers cannot stand for in timm's models, and why."""

from timm.layers import AttentionPool2d, DiffAttention, MultiQueryAttention2d, RotAttentionPool2d
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.layers.non_local_attn import BatNonLocalAttn
from timm.layers.selective_kernel import SelectiveKernelAttn
from timm.layers.split_attn import SplitAttn
from timm.models.coat import FactorAttnConvRelPosEnc
from timm.models.edgenext import CrossCovarianceAttn
from timm.models.efficientformer_v2 import Attention2d
from timm.models.efficientvim import HSMSSD
from timm.models.efficientvit_mit import LiteMLA
from timm.models.focalnet import FocalModulation
from timm.models.iformer import SHMA
from timm.models.mobilevit import LinearSelfAttention
from timm.models.mvitv2 import MultiScaleAttention
from timm.models.swiftformer import EfficientAdditiveAttention
from timm.models.vision_transformer import DiffParallelScalingBlock
from timm.models.xcit import XCA

from .host import register_reason

NO_MAP = "there is no map of tokens on tokens"
TWO_MAPS = "weighs a value by the difference of two maps, where a mixer has one map for each value"
SINGLE = "has a single query, which is no token of the grid"

REASONS = {
    XCA: f"weighs channels by channels: {NO_MAP}",
    CrossCovarianceAttn: f"weighs channels by channels: {NO_MAP}",
    FactorAttnConvRelPosEnc: f"multiplies keys by values before queries: {NO_MAP}",
    LiteMLA: f"multiplies keys by values before queries: {NO_MAP}",
    EfficientAdditiveAttention: f"sums its queries up to a single one: {NO_MAP}",
    LinearSelfAttention: f"sums its keys up to a single one: {NO_MAP}",
    SplitAttn: f"weighs the branches of a convolution: {NO_MAP}",
    SelectiveKernelAttn: f"weighs the branches of a convolution: {NO_MAP}",
    HSMSSD: f"mixes tokens through a few states: {NO_MAP}",
    FocalModulation: f"mixes tokens by convolutions of growing size: {NO_MAP}",
    LambdaLayer: f"makes a linear function of the context: {NO_MAP}",
    BatNonLocalAttn: "makes rows by rows and columns by columns of the input, not tokens by tokens",
    HaloAttn: "has keys around a window that its queries are in: other tokens than the queries'",
    MultiQueryAttention2d: "shares one key and value among all heads, and reduces tokens for the two apart",
    SHMA: "passes its values through the sigmoid of its gate, for which a mixer has no place",
    MultiScaleAttention: "pools projected values and adds its query to what comes out: a mixer does neither",
    Attention2d: "adds a convolution of its projected values to what comes out, which a mixer does not",
    DiffAttention: TWO_MAPS,
    DiffParallelScalingBlock: TWO_MAPS,
    AttentionPool2d: SINGLE,
    RotAttentionPool2d: SINGLE,
}
"""By class of module or model."""

for _cls, _reason in REASONS.items():
    register_reason(_cls, _reason)
