"""FlexAttention reads the same masks as dense attention and gives the same numbers."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from vtok.layers.flow import FlowBlock, FlowTransformer, Spans
from vtok.layers.masks import ENCODER_MASKS, CrossTime, decoder_mask, encoder_mask, with_valid_keys
from vtok.layers.transformer import Transformer, flex_attend, flex_blocks

PATCHES, REGISTERS = 24, 16


def masks() -> dict[str, torch.Tensor]:
    """Every mask the encoder and decoder may use, whole and with padded clips."""
    valid = torch.ones(2, PATCHES + REGISTERS, dtype=torch.bool)
    valid[1, PATCHES // 2 : PATCHES] = False
    valid[1, -REGISTERS // 2 :] = False
    out = {}
    for kind in ENCODER_MASKS:
        blocks = 4 if kind.startswith("time_block") else 1
        sizes = dict(patches=PATCHES, registers=REGISTERS, blocks=blocks)
        for which, mask in (("encoder", encoder_mask(kind, **sizes)), ("decoder", decoder_mask(kind, **sizes))):
            if mask is not None:
                out[f"{which}-{kind}"] = mask
            padded = with_valid_keys(mask, valid)
            assert padded is not None
            out[f"{which}-{kind}-padded"] = padded
    for cross in (CrossTime(), CrossTime(p_p="none", p_r="full"), CrossTime(r_r="causal"), CrossTime(r_p="none")):
        mask = encoder_mask("flexible", patches=PATCHES, registers=REGISTERS, blocks=4, cross=cross)
        assert mask is not None
        out[f"encoder-flexible-{'-'.join(asdict(cross).values())}"] = mask
    return out


MASKS = masks()


def test_the_masks_differ():
    assert len(MASKS) == 2 * len(ENCODER_MASKS) + 5 + 4
    assert all(bool((~mask).any()) and bool(mask.any(-1).all()) for mask in MASKS.values())


@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_flex_equals_dense_on_the_cpu(name):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, PATCHES + REGISTERS, 16).unbind(0)
    mask = MASKS[name]
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if mask.ndim == 2 else mask[:, None])
    found = flex_attend(q, k, v, flex_blocks(mask))
    assert (found - dense).abs().max() < 1e-5
    other = flex_attend(q, k, v, flex_blocks(torch.ones_like(mask)))
    assert (other - dense).abs().max() > 1e-2, "a mask that hides nothing gives something else"


@torch.no_grad()
def test_a_block_of_the_flow_decoder_with_flex_equals_dense_on_the_cpu():
    """Clips of fewer latent frames than others: what is not there is hidden."""
    torch.manual_seed(0)
    block, spans = FlowBlock(32, 2, mlp_ratio=2.0, mlp="swiglu"), Spans(6, 4)
    for parameter in block.parameters():
        parameter.normal_(std=0.2)
    x, condition = torch.randn(2, 30, 32), torch.randn(2, 3, 32)
    real = torch.tensor([[True] * 3, [True, False, False]])
    mask = with_valid_keys(None, torch.cat([real.repeat_interleave(count, 1) for count in (6, 4)], 1))
    assert mask is not None
    dense, flex = (block(x, condition, spans, mask, blocks) for blocks in (None, flex_blocks(mask)))
    assert torch.allclose(flex, dense, atol=1e-5, rtol=1e-5)
    assert (block(x, condition, spans, None) - dense).abs().max() > 1e-2, "what is hidden makes a difference"


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernels and backward pass need CUDA")


@pytest.mark.gpu
@GPU
def test_a_flow_decoder_with_flex_equals_dense_on_cuda():
    torch.manual_seed(0)
    dense, flex = (FlowTransformer(64, 2, 2, flex=on).cuda() for on in (False, True))
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    flex.load_state_dict(dense.state_dict())
    x, level, spans = torch.randn(2, 120, 64, device="cuda"), torch.rand(2, 3, device="cuda"), Spans(24, 16)
    real = torch.tensor([[True] * 3, [True, False, False]], device="cuda")
    mask = with_valid_keys(None, torch.cat([real.repeat_interleave(count, 1) for count in (24, 16)], 1))
    (a, _), (b, _) = dense(x, level, spans, mask), flex(x, level, spans, mask)
    assert torch.allclose(a, b, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("name", MASKS)
def test_a_transformer_with_flex_equals_dense_on_cuda(name):
    """Outputs and every gradient, float32."""
    torch.manual_seed(0)
    dense = Transformer(64, 2, 2).cuda()
    flex = Transformer(64, 2, 2, flex=True).cuda()
    flex.load_state_dict(dense.state_dict())
    x = torch.randn(2, PATCHES + REGISTERS, 64, device="cuda")
    weight = torch.randn_like(x)
    mask = MASKS[name].cuda()
    outputs = []
    for net in (dense, flex):
        given = x.clone().requires_grad_()
        out = net(given, mask)
        (out * weight).sum().backward()
        assert given.grad is not None
        outputs.append((out.detach(), given.grad))
    assert torch.allclose(outputs[0][0], outputs[1][0], atol=2e-3, rtol=2e-3)
    assert torch.allclose(outputs[0][1], outputs[1][1], atol=5e-3, rtol=5e-3)
    for (key, a), b in zip(dense.named_parameters(), flex.parameters()):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-2, rtol=1e-2), key
