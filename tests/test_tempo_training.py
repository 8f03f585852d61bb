"""Shares by score in sharded training: ranks whose videos differ in length, and whose answers are not all known, keep
step."""

from __future__ import annotations

import pytest
from launching import ranks
from test_llm import small_model, small_tokenizer

SCRIPT = """
import deepspeed
import torch
from torch import nn
from vtok.budget import AtaConfig
from vtok.families.language import Config, SmallLM, TowerConfig, build
from vtok.llm.relevance import ranking_loss
from vtok.types import Clip, Features

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at the first use, for minutes
rank = torch.distributed.get_rank()

class Step(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, clip, budget, right):
        tokens = self.model.encode(clip, budget=budget)
        known = torch.arange(tokens.scores.shape[1]) == right
        loss, _ = ranking_loss(tokens.scores, known.expand_as(tokens.scores))
        return (tokens.embeddings / 0.05 - 1)[tokens.mask].square().mean() + loss

def videos(long):
    frames = 20 if long else 3
    seen = Features(torch.randn(1, frames, 12, 5), (3, 4))
    return Clip(["a"], features={{"tower": seen}}, prompt=["what moves?"])

whole = {{"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}}
plan = {{"train_micro_batch_size_per_gpu": 1, "zero_optimization": whole}}
sizes = dict(embedding_dim=24, embedding_rms=0.05, num_tokens=6, max_tokens=200, in_dim=5)
for score in ("learned", "yes_no", "similarity"):
    torch.manual_seed(0)
    ata = AtaConfig(score=score, minimum=1, maximum=6)
    own = dict(source="video", window=3, question=True, tower=TowerConfig(name="tower"), ata=ata)
    model = build(Config(lm=SmallLM(name={folder!r}, checkpoint=True), **sizes, **own)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.003)
    engine, *_ = deepspeed.initialize(model=Step(model), optimizer=optimizer, config=plan)
    losses = []
    for step in range(4):
        torch.manual_seed(7)
        long = bool((rank + step) % 2)
        loss = engine(videos(long), [None, 9, 4, None][step], 3 if long else -1)  # short ones say nothing
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, losses)
    short, long = [everyone[0][0], everyone[1][3]], [everyone[1][0], everyone[0][3]]
    assert short[1] < short[0] and long[1] < long[0], (score, everyone)
    if rank == 0:
        print("trained", score, flush=True)
"""


@pytest.mark.long
def test_ranks_of_short_and_long_videos_keep_step(tmp_path):
    pytest.importorskip("deepspeed")
    tokenizer = small_tokenizer("llama")
    small_model("llama", len(tokenizer)).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    said = ranks(tmp_path, SCRIPT.format(folder=str(tmp_path / "lm")))
    trained = [line for line in said[0].splitlines() if line.startswith("trained")]
    assert trained == ["trained learned", "trained yes_no", "trained similarity"], (said[0][-3000:], said[1][-3000:])
