"""EoMT's forward pass (Kerssies et al. 2025) over transformers' own layers.

Transformers' forward takes square images of one size and keeps to itself what the layers before the last one predict;
here, images are of any size that patches fill, and every prediction comes out. For square images of the configured size
both give the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentation

from raysseg.models.queries import Queries


def predict_layers(
    net: EomtForUniversalSegmentation,
    pixels: Tensor,
    mask_shares: Sequence[float],
    seeds: Tensor | None = None,
    *,
    is_last_enough: bool,
) -> list[Queries]:
    """What the queries predict, after each of the last blocks.

    Args:
        net: its layers are used.
        pixels: (B, 3, H, W) normalised; H and W are multiples of the patch's size.
        mask_shares: for each block with queries, the share of them that attend only to where the block before saw
            their mask.
        seeds: (B,) decide which queries these are, where the share is neither 0 nor 1.
        is_last_enough: predict nothing that is not needed for the last prediction.
    """
    config, patch = net.config, net.config.patch_size
    grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
    hidden = _to_tokens(net, pixels, grid)  # (B, prefix + patches, D)
    first_with_queries = len(net.layers) - config.num_blocks
    draws = _draw(seeds, config.num_blocks, config.num_queries) if seeds is not None else None
    layers: list[Queries] = []
    for i, layer in enumerate(net.layers):
        may_attend = None
        if i == first_with_queries:
            hidden = torch.cat([net.query.weight.expand(len(hidden), -1, -1), hidden], 1)
        if (block := i - first_with_queries) >= 0:
            share = mask_shares[block]
            if share > 0 or not is_last_enough:
                layers.append(_predict(net, hidden, grid))
            if share > 0:
                draw = draws[block] if draws is not None and share < 1 else None
                may_attend = _attention(layers[-1], hidden.shape[1], grid, share, draw)
        hidden = layer(hidden, may_attend)
    return [*layers, _predict(net, hidden, grid)]


def mask_share(progress: float, block: int, num_blocks: int) -> float:
    """The share of queries with masked attention at a point of the training, 0 to 1, for one of the last blocks.

    The authors' schedule: of the training's num_blocks + 2 equal parts, block i (from 0) is annealed in part i + 1,
    by a polynomial of power 0.9; after that it needs no masks any more.
    """
    part = progress * (num_blocks + 2) - (block + 1)
    return float((1 - min(max(part, 0.0), 1.0)) ** 0.9)


def _to_tokens(net: EomtForUniversalSegmentation, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Class token, registers, and patches with their position embeddings, (B, prefix + patches, D)."""
    embeddings = net.embeddings
    patches = embeddings.patch_embeddings(pixels)  # (B, h * w, D)
    positions = embeddings.position_embeddings.weight  # (g * g, D)
    if grid != net.grid_size:
        square = positions.T.unflatten(1, net.grid_size)[None]
        positions = F.interpolate(square, grid, mode="bicubic", align_corners=False)[0].flatten(1).T
    prefix = torch.cat([embeddings.cls_token, embeddings.register_tokens], 1).expand(len(pixels), -1, -1)
    tokens: Tensor = embeddings.dropout(torch.cat([prefix, patches + positions], 1))
    return tokens


def _predict(net: EomtForUniversalSegmentation, hidden: Tensor, grid: tuple[int, int]) -> Queries:
    normed = net.layernorm(hidden)
    num_queries = net.config.num_queries
    queries = normed[:, :num_queries]
    patches = normed[:, num_queries + net.embeddings.num_prefix_tokens :]
    maps = net.upscale_block(patches.transpose(1, 2).unflatten(2, grid))  # (B, D, h, w)
    return Queries(net.class_predictor(queries), torch.einsum("bqd,bdhw->bqhw", net.mask_head(queries), maps))


@torch.no_grad()
def _attention(layer: Queries, num_tokens: int, grid: tuple[int, int], share: float, draw: Tensor | None) -> Tensor:
    """Whether a token may attend to another, (B, 1, tokens, tokens): all but queries to patches outside their mask."""
    assert layer.mask_logits is not None
    is_inside = F.interpolate(layer.mask_logits, grid, mode="bilinear").flatten(2) > 0  # (B, Q, patches)
    if draw is not None:
        is_inside |= (draw.to(is_inside.device) > share)[..., None]
    batch_size, num_queries, num_patches = is_inside.shape
    may_attend = is_inside.new_ones(batch_size, 1, num_tokens, num_tokens)
    may_attend[:, 0, :num_queries, num_tokens - num_patches :] = is_inside
    return may_attend


def _draw(seeds: Tensor, num_blocks: int, num_queries: int) -> Tensor:
    """A number in [0, 1] for each block, image and query, from the image's seed alone; (blocks, B, Q)."""
    size = (num_blocks, num_queries)
    rows = [torch.rand(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
    return torch.stack(rows, 1)
