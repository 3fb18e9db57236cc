"""The reference's two families, written again from their description, with its parameter names.

Independent of the package, every attention map stored. Only square maps, as the reference; in the small transformer
rows stand in token order, which is the one fix.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(dim))

    def forward(self, x):
        return x * self.scale


class StarReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1) + 0.5)
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, x):
        return self.scale * x.clamp(min=0) ** 2 + self.bias


class WeightNorm(nn.Module):
    """Layer norm over the last axis without a bias, eps 1e-6."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, None, 1e-6)


class SepConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.pwconv1 = nn.Linear(dim, 2 * dim, bias=False)
        self.act1 = StarReLU()
        self.dwconv = nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=False)
        self.pwconv2 = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x):
        x = self.act1(self.pwconv1(x)).permute(0, 3, 1, 2)
        return self.pwconv2(self.dwconv(x).permute(0, 2, 3, 1))


class Mhsa(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).reshape(b, h * w, 3, c // 32, 32).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(2, 3) * 32**-0.5).softmax(-1)
        return self.proj((a @ v).permute(0, 2, 1, 3).reshape(b, h, w, c))


class Ska(nn.Module):
    def __init__(self, dim, tokens):
        super().__init__()
        self.k = nn.Parameter(torch.randn(dim // 32, tokens, 32))
        self.v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        b, h, w, c = x.shape
        q = x.reshape(b, h * w, c // 32, 32).permute(0, 2, 1, 3)
        v = self.v(x).reshape(b, h * w, c // 32, 32).permute(0, 2, 1, 3)
        k = self.k.unsqueeze(0).repeat(b, 1, 1, 1)
        a = (q @ k.transpose(2, 3) * 32**-0.5).softmax(-1)
        return self.proj((a @ v).permute(0, 2, 1, 3).reshape(b, h, w, c))


class Cska(nn.Module):
    def __init__(self, dim, tokens):
        super().__init__()
        self.heads, self.tokens = dim // 16, tokens
        self.qv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_k = nn.Conv2d(dim, self.heads * tokens, 3, padding=1, groups=self.heads)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        b, h, w, c = x.shape
        q, v = self.qv(x).chunk(2, dim=-1)
        logits = self.to_k(q.permute(0, 3, 1, 2)).reshape(b, self.heads, self.tokens, h * w)
        a = (logits.transpose(2, 3) * 16**-0.5).softmax(-1)
        v = v.reshape(b, h * w, self.heads, 16).permute(0, 2, 1, 3)
        return self.proj((a @ v).permute(0, 2, 1, 3).reshape(b, h, w, c))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim, bias=False)
        self.act = StarReLU()
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class FormerBlock(nn.Module):
    def __init__(self, dim, mixer, scaled):
        super().__init__()
        self.norm1 = WeightNorm(dim)
        self.token_mixer = mixer
        self.norm2 = WeightNorm(dim)
        self.mlp = Mlp(dim)
        self.res_scale1 = Scale(dim) if scaled else nn.Identity()
        self.res_scale2 = Scale(dim) if scaled else nn.Identity()

    def forward(self, x):
        x = self.res_scale1(x) + self.token_mixer(self.norm1(x))
        return self.res_scale2(x) + self.mlp(self.norm2(x))


class Downsampling(nn.Module):
    def __init__(self, inputs, outputs, first):
        super().__init__()
        self.pre_norm = nn.Identity() if first else WeightNorm(inputs)
        self.conv = nn.Conv2d(inputs, outputs, *((7, 4, 2) if first else (3, 2, 1)))
        self.post_norm = WeightNorm(outputs) if first else nn.Identity()

    def forward(self, x):
        x = self.conv(self.pre_norm(x).permute(0, 3, 1, 2))
        return self.post_norm(x.permute(0, 2, 3, 1))


class FormerHead(nn.Module):
    def __init__(self, dim, classes):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.norm = nn.LayerNorm(4 * dim, eps=1e-6)
        self.fc2 = nn.Linear(4 * dim, classes)

    def forward(self, x):
        return self.fc2(self.norm(self.fc1(x).clamp(min=0) ** 2))


class ReferenceFormer(nn.Module):
    """[SepConv, second, MHSA, MHSA] on a square image of ``size`` pixels."""

    def __init__(self, second, depths, dims, size, classes):
        super().__init__()
        sides = [size // 4, size // 8, size // 16, size // 32]
        kinds = [
            lambda d, n: SepConv(d),
            {"ska": Ska, "cska": Cska}[second],
            lambda d, n: Mhsa(d),
            lambda d, n: Mhsa(d),
        ]
        widths = [3, *dims]
        self.downsample_layers = nn.ModuleList(Downsampling(widths[i], dims[i], i == 0) for i in range(4))
        self.stages = nn.ModuleList(
            nn.Sequential(*(FormerBlock(dims[i], kinds[i](dims[i], sides[i] ** 2), i > 1) for _ in range(depths[i])))
            for i in range(4)
        )
        self.norm = nn.LayerNorm(dims[3], eps=1e-6)
        self.head = FormerHead(dims[3], classes)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.head(self.norm(x.mean((1, 2))))


class PatchTokens(nn.Module):
    def __init__(self, dim, patch, chans):
        super().__init__()
        width = 5 * chans * patch * patch
        self.patch = patch
        self.to_patch_tokens = nn.Sequential(nn.Identity(), nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, x):
        b, _, h, w = x.shape
        shifted = [x]
        for left, right, top, bottom in ((1, -1, 0, 0), (-1, 1, 0, 0), (0, 0, 1, -1), (0, 0, -1, 1)):
            shifted.append(F.pad(x, (left, right, top, bottom)))
        x = torch.cat(shifted, dim=1)
        patches = []
        for i in range(0, h, self.patch):
            for j in range(0, w, self.patch):
                patch = x[:, :, i : i + self.patch, j : j + self.patch]
                patches.append(patch.permute(0, 2, 3, 1).reshape(b, -1))
        return self.to_patch_tokens(torch.stack(patches, dim=1))


class LocalityAttention(nn.Module):
    def __init__(self, kind, dim, heads, width, side):
        super().__init__()
        self.kind, self.heads, self.width, self.side = kind, heads, width, side
        tokens = 1 + side * side
        self.temperature = nn.Parameter(torch.tensor(width**-0.5).log() + 0.3)
        if kind == "mhsa":
            self.to_qkv = nn.Linear(dim, 3 * heads * width, bias=False)
        else:
            self.to_qv = nn.Linear(dim, 2 * heads * width, bias=False)
        if kind == "ska":
            self.k = nn.Parameter(torch.randn(heads, tokens, width))
        if kind == "cska":
            self.k2 = nn.Parameter(torch.randn(heads, tokens, width))
            self.to_k = nn.Conv2d(heads * width, heads * tokens, 3, padding=1, groups=heads)
        self.to_out = nn.Sequential(nn.Linear(heads * width, dim), nn.Dropout(0.1))

    def forward(self, x):
        b, n, _ = x.shape

        def heads(t):
            return t.reshape(b, n, self.heads, self.width).permute(0, 2, 1, 3)

        if self.kind == "mhsa":
            q, k, v = map(heads, self.to_qkv(x).chunk(3, dim=-1))
            logits = q @ k.transpose(2, 3) * self.temperature.exp()
        else:
            q, v = map(heads, self.to_qv(x).chunk(2, dim=-1))
        if self.kind == "ska":
            logits = q @ self.k.transpose(1, 2) * self.temperature.exp()
        if self.kind == "cska":
            first = q[:, :, :1] @ self.k2.transpose(1, 2) * self.temperature.exp()
            maps = q[:, :, 1:].transpose(2, 3).reshape(b, -1, self.side, self.side)
            rest = self.to_k(maps).reshape(b, self.heads, n, n - 1).transpose(2, 3)
            logits = torch.cat([first, rest], dim=2)
        logits = logits.masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
        out = logits.softmax(-1) @ v
        return self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, -1))


class PreNorm(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x):
        return self.fn(self.norm(x))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, dim), nn.Dropout(0.1)
        )

    def forward(self, x):
        return self.net(x)


class Transformer(nn.Module):
    def __init__(self, kind, dim, depth, heads, width, side, hidden):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, LocalityAttention(kind, dim, heads, width, side)),
                    PreNorm(dim, FeedForward(dim, hidden)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x):
        for attention, perceptron in self.layers:
            x = x + attention(x)
            x = x + perceptron(x)
        return x


class ReferenceSmallVit(nn.Module):
    """The small transformer: shifted patches, a class token, locality-aware attention of one kind."""

    def __init__(self, kind, *, dim, depth, heads, width, hidden, classes, size=32, patch=4):
        super().__init__()
        side = size // patch
        self.to_patch_embedding = PatchTokens(dim, patch, 3)
        self.pos_embedding = nn.Parameter(torch.randn(1, side * side + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.transformer = Transformer(kind, dim, depth, heads, width, side, hidden)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, x):
        x = self.to_patch_embedding(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        return self.mlp_head(self.transformer(x)[:, 0])
