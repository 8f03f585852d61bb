"""An autoregressive prior over token ids that also shapes the tokens it reads.

Letters: B batch, K tokens, D width of a token, V codebook size, W width of the transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.sampling import draw
from vtok.layers.transformer import Transformer


@dataclass
class PriorConfig:
    weight: float = 0.0  # of the next-token cross-entropy; 0 = no prior
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    rounds: int = 2  # passes of scheduled sampling; 1 = teacher forcing only
    mix: float = 0.5  # share of inputs taken from the prior's own samples once the ramp is over
    ramp_steps: int = 0  # steps from no mixing to `mix`; 0 = at once


class ARPrior(nn.Module):
    """Predicts token i from the quantized vectors of tokens < i; its gradient reaches the tokenizer through them.

    LARP, Wang et al. 2024, https://arxiv.org/abs/2410.21264. Scheduled sampling for transformers as
    Mihaylova and Martins 2019, https://arxiv.org/abs/1906.07651: a first pass without gradient samples ids, a share of
    the inputs is replaced by their vectors, the loss is taken on the pass that follows.
    """

    def __init__(self, config: PriorConfig, *, dim: int, codebook_size: int, max_tokens: int):
        super().__init__()
        if config.rounds < 1 or not 0 <= config.mix <= 1:
            raise ValueError(f"objective.prior: rounds={config.rounds} must be 1 or more, mix={config.mix} in [0, 1]")
        self.config = config
        self.code_in = nn.Linear(dim, config.width)
        self.start = nn.Parameter(torch.randn(config.width) * 0.02)
        self.places = nn.Parameter(torch.randn(max_tokens, config.width) * 0.02)
        self.transformer = Transformer(config.width, config.depth, config.num_heads)
        self.head = nn.Linear(config.width, codebook_size)

    def logits(self, codes: Tensor) -> Tensor:
        """codes [B, K, D] -> [B, K, V]: entry i is computed from codes < i."""
        x = self.code_in(codes[:, :-1])
        x = torch.cat([self.start.to(x).expand(x.shape[0], 1, -1), x], 1)
        x = x + self.places[: x.shape[1]].to(x)
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        return self.head(self.transformer(x, causal))

    def forward(
        self, codes: Tensor, ids: Tensor, *, lookup: Callable[[Tensor], Tensor], step: int, mask: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy in nats of ids [B, K] given codes [B, K, D]; mask [B, K] leaves padding out of the mean."""
        c = self.config
        mix = c.mix * min(step / c.ramp_steps, 1.0) if c.ramp_steps else c.mix
        inputs = codes
        if self.training:
            for _ in range(c.rounds - 1):  # always run, so that every rank calls the prior equally often
                with torch.no_grad():
                    probabilities = self.logits(inputs).float().softmax(-1)
                    drawn = draw(probabilities)
                replace = torch.rand(ids.shape, device=ids.device) < mix
                inputs = torch.where(replace[..., None], lookup(drawn[..., None]).to(codes), codes)
        loss = F.cross_entropy(self.logits(inputs).float().flatten(0, 1), ids.flatten(), reduction="none")
        loss = loss.reshape(ids.shape)
        return loss.mean() if mask is None else (loss * mask).sum() / mask.sum()
