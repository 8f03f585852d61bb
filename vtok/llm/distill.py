"""What a language model makes of few tokens, pulled towards what it makes of all of them; the same LLM reads both.

Letters: M answer positions of all texts, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def logit_divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """[M, V] twice -> [M]: KL(teacher || student) in nats of the distributions at a temperature, times its square.

    The square keeps the gradient's size whatever the temperature (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531). 0 where both agree.
    """
    known = torch.log_softmax(teacher.float() / temperature, -1)
    guess = torch.log_softmax(student.float() / temperature, -1)
    return (known.exp() * (known - guess)).sum(-1) * temperature**2


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """States [M, D] of the same layers -> [M]: squared distance over the teacher's squared length, mean over layers.

    Relative, since the size of states differs by orders of magnitude between layers and models; TinyBERT (Jiao et al.
    2019, https://arxiv.org/abs/1909.10351) takes the plain mean squared error. 0 where both agree.
    """
    parts = [
        (s.float() - t.float()).square().sum(-1) / t.float().square().sum(-1).clamp(min=1e-12)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(parts).mean(0)
