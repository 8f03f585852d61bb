"""How a network of registers begins: places, a first attention that reads by place, and the pace of narrow models.

Only initial values: nothing here adds a parameter or an operation. Where every register begins as the same small noise
it reads the mean of all patches, and a run paints one colour for its first hundreds of steps. With these values
register i starts at the position of one patch and the first block attends by position, with values passed on as they
are (in the spirit of Trockman and Kolter 2023, https://arxiv.org/abs/2305.09828).

Letters: N patches, D width, K tokens of a time block.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vtok.layers.positions import Positions
from vtok.layers.transformer import Attention, Block, Transformer

REFERENCE_WIDTH = 768  # of TiTok-B, One-D-Piece-B, LARP and AdapTok: what their learning rates are made for
_POSITION_STD = 0.4  # of each axis' table: positions and patches then weigh alike in a token
_MARK = 0.5  # rms of the constant that marks them
_SHARPNESS = 16.0  # attention logit between a token and its own place
_CONTENT_STD = 0.3  # of what patches hold beside their positions, after the norm
_OWN_STD = 0.3  # of what sets registers of one patch apart
_LIKENESS = 0.3  # standard deviation of a logit over ids for each direction in which their codes differ


def patch_of_token(num_tokens: int, grid: tuple[int, int, int], blocks: int) -> Tensor:
    """[blocks * num_tokens] int64: the patch each learned register begins at. Steps of the golden ratio over the
    patches of its time block in raster order, so that every prefix of a block is spread evenly, and no patch is taken
    twice before all are taken."""
    patches = math.prod(grid) // blocks
    stride = next(s for s in range(max(round(patches * 0.618), 1), 2 * patches + 1) if math.gcd(s, patches) == 1)
    return torch.cat([b * patches + torch.arange(num_tokens) * stride % patches for b in range(blocks)])


def start_attention(
    attention: Attention, norm: Callable[[Tensor], Tensor], positions: Tensor, source: nn.Linear
) -> Tensor:
    """Initial weights of a first `attention`, which reads through `norm`, with which a token attends to what lies at
    its own place and came through `source`, and takes over what that holds.

    Queries and keys are the principal components of `positions` [N, D], whitened as far as they exceed content; one
    more component tells tokens of `source` (patches in an encoder, codes in a decoder) from those that ask, by a
    constant in its bias.
    Returns: [n, D] orthonormal directions in which places and that constant lie, which are not taken over.
    """
    width = positions.shape[1]
    if len(positions) < 2:
        return positions.new_zeros(0, width)
    size = width // attention.num_heads
    normed = norm(positions)
    centre = normed.mean(0)
    _, values, basis = torch.linalg.svd((normed - centre).double(), full_matrices=False)
    variance = values.float().square() / len(positions)
    rank = max(min(int((variance > 0.01 * variance[0]).sum()), size - 1, width // 2), 1)
    basis, variance = basis[:rank].float(), variance[:rank]
    marker = torch.randn(width)
    marker = marker - marker.mean() - basis.T @ (basis @ marker)
    marker = marker / marker.norm()
    source.bias.copy_(_MARK * width**0.5 * marker)
    floor = variance + _CONTENT_STD**2  # directions in which patches differ more than places tell little
    place, shift = torch.zeros(size, width), torch.zeros(size)
    place[:rank] = basis * (_SHARPNESS * size**0.5 / (variance / floor).sum() / floor[:, None]).sqrt()
    shift[:rank] = -place[:rank] @ centre
    key, ask = place.clone(), shift.clone()
    key[-1] = marker * (_SHARPNESS / (_MARK * width**0.5))
    ask[-1] = size**0.5
    basis = torch.cat([basis, marker[None]])
    mix = nn.init.orthogonal_(torch.empty(width, width))
    value = mix - mix @ basis.T @ basis
    heads = attention.num_heads
    attention.qkv.weight.copy_(torch.cat([place.repeat(heads, 1), key.repeat(heads, 1), value]))
    attention.qkv.bias.copy_(torch.cat([ask.repeat(heads), shift.repeat(heads), -value @ centre]))
    attention.out.weight.copy_(mix.T)
    return basis


def _start_first(net: Transformer, positions: Tensor, source: nn.Linear) -> Tensor:
    """`start_attention` of the first block, where there is one."""
    if not len(net.blocks):
        return positions.new_zeros(0, positions.shape[1])
    block = net.blocks[0]
    assert isinstance(block, Block)
    return start_attention(block.attention, block.norm1, positions, source)


def spread(positions: Positions) -> None:
    """Learned position tables begin as large as what patches hold, in place."""
    if positions.kind == "learned":
        for table in positions.tables:
            nn.init.normal_(table, std=_POSITION_STD)


def show_content(reader: nn.Linear, code_in: nn.Linear, places: Tensor, mark: Tensor, *, code_size: float) -> None:
    """Initial values, in place, with which what a clip holds is not small beside what is the same in every clip.

    `reader`, which takes latents [latent] from registers, sees nothing of their places [N, D] nor of the mark [D] of
    patches: registers differ by place far more than clips do by what they hold, so that nine tenths of the variance of
    unit-length latents lie between registers, and few entries of a codebook are used. `code_in`, which gives the
    decoder its tokens, is enlarged by 1 / code_size, the root mean square of an entry of a code: where a thousand ids
    are to be told from unit-length codes, a run learns how often each comes at a place first, and content late.
    """
    constants = torch.cat([places, mark[None]])
    _, size, basis = torch.linalg.svd(constants.double(), full_matrices=False)
    rank = min(int((size > 0.01 * size[0]).sum()), places.shape[1] // 2)
    basis = basis[:rank].to(reader.weight)
    reader.weight.sub_(reader.weight @ basis.T @ basis)
    code_in.weight.div_(code_size)


def begin_encoder(
    net: Transformer, places: Tensor, spots: Tensor, source: nn.Linear, registers: Tensor, reader: nn.Linear
) -> None:
    """Initial values, in place, of an encoder whose registers [R, D] read the patches they lie on.

    places: [N, D] positions of the patches; spots: [R] patch of each register; source: gives the patches; reader: takes
    latents from the registers.
    """
    basis = _start_first(net, places, source)
    own = torch.randn_like(registers) * _OWN_STD
    registers.copy_(places[spots] + own - own @ basis.T @ basis)
    learn_as_wide(net, reader)


def begin_decoder(
    net: Transformer, places: Tensor, spots: Tensor, source: nn.Linear, registers: Tensor, last: nn.Linear
) -> None:
    """Initial values, in place, of a decoder whose queries read the tokens that lie where they are; its output is zero.

    places: [N, D] positions of the queries; spots: [R, D] positions of the tokens, which `registers` become; source:
    gives the tokens; last: reads the queries.
    """
    registers.copy_(spots)
    _start_first(net, places, source)
    learn_as_wide(net, last)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


@torch.no_grad()
def begin_head(head: nn.Linear, sizes: list[int], digits: list[Tensor], codes: Tensor) -> dict[str, float]:
    """Initial values, in place, of a head that predicts ids of a frozen codebook: how often each comes, and which are
    alike.

    The bias is the logarithm of how often an id comes, the weights are the principal components of the codes, whitened,
    in random directions of the width: what raises an id raises its neighbours in the codebook too. From zero every row
    learns alone, and a row is only met as often as its id.
    Args: head: after a norm that `learn_as_wide` has set, [D] -> sum(sizes); sizes: of each digit of an id; digits: of
        each, [n] int64, of tokens of training clips; codes: [n, C] their embeddings.
    Returns: entropy of the ids, nats a token, and the number of directions.
    """
    width, found = head.in_features, {"id_entropy": 0.0, "id_directions": 0.0}
    weights, biases = [], []
    codes = codes.double()
    centre = codes.mean(0)
    for size, digit in zip(sizes, digits, strict=True):
        count = torch.bincount(digit, minlength=size).double()[:, None]
        apart = codes.new_zeros(size, codes.shape[1]).index_add_(0, digit, codes) / count.clamp_min(1) - centre
        apart *= count > 0
        share = (count + 0.5) / (count + 0.5).sum()
        _, spreads, basis = torch.linalg.svd(apart * share.sqrt(), full_matrices=False)
        rank = min(int((spreads > 0.1 * spreads[0]).sum()), width // 2)
        white = apart @ (basis[:rank] / spreads[:rank, None]).T
        directions = nn.init.orthogonal_(torch.empty(rank, width)) if rank else torch.empty(0, width)
        weights.append(_LIKENESS / _gain(width) * white.to(directions) @ directions)
        biases.append(share.log().to(directions).flatten())
        found["id_entropy"] -= float((share * share.log()).sum())
        found["id_directions"] += rank
    head.weight.copy_(torch.cat(weights))
    head.bias.copy_(torch.cat(biases))
    return found


def _gain(width: int) -> float:
    return max(1.0, REFERENCE_WIDTH / width)


def learn_as_wide(net: Transformer, last: nn.Module) -> None:
    """Gains of the norms begin at REFERENCE_WIDTH / width, the weights that read them as much smaller: one function.

    An AdamW step changes what a matrix gives by about lr x width x gain, so that a narrow model moves as far in a step
    as the papers' width does at the same optim.lr (what muP does by a rate for each matrix: Yang et al. 2022,
    https://arxiv.org/abs/2203.03466, table 8). At REFERENCE_WIDTH and above nothing changes.
    """
    pairs: list[tuple[nn.Module, nn.Module]] = [(net.norm, last)]
    for block in net.blocks:
        assert isinstance(block, Block)
        pairs += [(block.norm1, block.attention.qkv), (block.norm2, block.mlp.up)]
    for norm, reader in pairs:
        assert isinstance(norm.weight, Tensor) and isinstance(reader.weight, Tensor)
        gain = _gain(norm.weight.shape[0])
        norm.weight.mul_(gain)
        reader.weight.div_(gain)
