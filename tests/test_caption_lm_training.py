"""Soft captions in sharded training: ranks whose captions have 1 and 40 words keep step, written or given."""

from __future__ import annotations

import pytest
import torch
from launching import ranks
from test_llm import small_model, small_tokenizer
from transformers import LlamaForCausalLM

SCRIPT = """
import deepspeed
import torch
from torch import nn
from vtok.families.language import Config, SmallLM, TowerConfig, build
from vtok.layers.base_tokens import BaseConfig
from vtok.llm.soft_captions import CaptionConfig
from vtok.types import Clip, Features

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at the first use, for minutes
rank = torch.distributed.get_rank()

class Step(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, clip, budget):
        tokens = self.model.encode(clip, budget=budget)
        loss = (tokens.embeddings / 0.05 - 1)[tokens.mask].square().mean()
        learned = self.model.captioner.learned
        return (loss if learned is None else loss + learned.nll), tokens.lengths

def videos(words):
    frames = 1 if words == 1 else 7
    seen = Features(torch.randn(1, frames, 12, 5), (3, 4), times=torch.arange(frames)[None] / 2.0)
    text = " ".join(["a"] * words)
    return Clip(["a"], features={{"tower": seen}}, captions=[[{{"text": text}}]])

whole = {{"stage": {stage}, "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}}
plan = {{"train_micro_batch_size_per_gpu": 1, "zero_optimization": whole}}
sizes = dict(embedding_dim=24, embedding_rms=0.05, num_tokens=40, max_tokens=400, in_dim=5, window=3)
sizes |= dict(mode="caption_lm", source="video", base=BaseConfig("pool", patches=2), tower=TowerConfig(name="tower"))
for how in ("generate", "teacher_forced", "parallel"):
    torch.manual_seed(0)
    captions = CaptionConfig(how=how)
    model = build(Config(lm=SmallLM(name={folder!r}, checkpoint=True), captions=captions, **sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.003)
    engine, *_ = deepspeed.initialize(model=Step(model), optimizer=optimizer, config=plan)
    losses = []
    for step in range(2 if how == "generate" else 4):  # writing 40 words is what takes long
        torch.manual_seed(7)
        words = 40 if (rank + step) % 2 else 1
        if how != "teacher_forced":  # as many as this rank's clip has to tell
            model.captioner._counts = lambda exact: (lambda before: torch.full((len(before),), words))
        loss, lengths = engine(videos(words), None)
        if how != "parallel":
            segments = 1 if words == 1 else 3
            assert int(lengths) >= segments * (2 + (words if how == "generate" else 1)), (how, words, lengths)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        engine.eval()
        _, lengths = engine(videos(40 if rank else 1), 30)
        assert 0 < int(lengths) <= 30
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, losses)
    first, last = ([each[at] for each in everyone] for at in (0, -1))  # in the last step clips have changed ranks
    assert sum(last) < sum(first), (how, everyone)
    if rank == 0:
        print("trained", how, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.long), 3])
def test_ranks_of_short_and_long_captions_keep_step(tmp_path, stage):
    pytest.importorskip("deepspeed")
    tokenizer = small_tokenizer("llama")
    config = small_model("llama", len(tokenizer)).config
    config.num_hidden_layers, config.max_position_embeddings = 1, 256
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    said = ranks(tmp_path, SCRIPT.format(stage=stage, folder=str(tmp_path / "lm")))
    trained = [line for line in said[0].splitlines() if line.startswith("trained")]
    assert trained == ["trained generate", "trained teacher_forced", "trained parallel"], (
        said[0][-3000:],
        said[1][-3000:],
    )
