"""What tokens cost an LLM, against torch's own counter; scores of answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vtok.evaluation.rows import bootstrap
from vtok.llm import TaskConfig
from vtok.llm.tasks import choose, is_question
from vtok.metrics.cost import shape_of
from vtok.metrics.language import by_kind, chance, exact_match, retained, token_f1
from vtok.types import Clip

transformers = pytest.importorskip("transformers")


def models():
    small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    gqa = transformers.LlamaConfig(**small, num_key_value_heads=2)
    wide = transformers.Qwen3Config(**small, num_key_value_heads=1, head_dim=16)
    gpt = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return [
        transformers.AutoModelForCausalLM.from_config(each, attn_implementation="eager") for each in (gqa, wide, gpt)
    ]


@pytest.mark.parametrize("which", range(3), ids=["grouped", "wide-heads", "gpt2"])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_prefill_is_what_torch_counts(which, tokens):
    model = models()[which].eval()
    shape = shape_of(model, model.config)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        out = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), logits_to_keep=1, use_cache=True)
    # torch counts attention over all pairs of positions, past and future
    both = 4 * tokens * tokens * shape.layers * shape.heads * shape.head_dim
    causal = 4 * (tokens * (tokens + 1) // 2) * shape.layers * shape.heads * shape.head_dim
    assert shape.prefill_flops(tokens) - causal + both == counter.get_total_flops()
    cache = out.past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.kv_bytes(tokens, bytes_per_number=4) == held


BASE = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0)
LOCAL = ["sliding_attention"] * 3 + ["full_attention"]


@pytest.mark.parametrize(
    "kind, own",
    [
        ("Gemma3", dict(head_dim=8, sliding_window=8, layer_types=LOCAL)),
        ("Mistral", dict(head_dim=8, sliding_window=8)),
        ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
        ("Qwen2", dict(sliding_window=8)),
    ],
)
def test_layers_with_windows_keep_what_they_still_see(kind, own):
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(**BASE, **own)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    shape = shape_of(model, config)
    for tokens in (5, 40):
        with torch.no_grad():
            cache = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1).past_key_values
        held = sum(x.numel() * 4 for layer in cache.layers for x in (layer.keys, layer.values))
        assert shape.kv_bytes(tokens, bytes_per_number=4) == held
    plain = replace(shape, windows=())
    assert shape.prefill_flops(5) == plain.prefill_flops(5)
    pairs = [sum(min(i + 1, w or 40) for i in range(40)) for w in shape.windows or [0] * 4]
    assert plain.prefill_flops(40) - shape.prefill_flops(40) == 4 * 4 * 8 * (4 * 820 - sum(pairs))


@pytest.mark.parametrize(
    "kind, own",
    [
        ("Lfm2", dict(layer_types=["conv", "conv", "conv", "full_attention"])),
        ("Jamba", dict(attn_layer_period=2, attn_layer_offset=1, num_experts=1, use_mamba_kernels=False,
                       mamba_dt_rank=4)),
    ],
)  # fmt: skip
def test_layers_that_are_no_attention_have_no_cost_here(kind, own):
    config = getattr(transformers, f"{kind}Config")(**BASE, **own)
    with pytest.raises(ValueError, match="not known|mixture of experts"):
        shape_of(getattr(transformers, f"{kind}ForCausalLM")(config), config)


def test_experts_are_refused():
    model = nn.ModuleDict({"experts": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="mixture of experts"):
        shape_of(model, transformers.GPT2Config())


def test_scores():
    assert exact_match("The Red square.", "red square") == 1 and exact_match("red", "red square") == 0
    assert token_f1("a red red square", "red square") == pytest.approx(0.8)
    assert token_f1("", "") == 1 and token_f1("", "x") == 0
    assert by_kind([1, 0, 1], ["order", "colour", "order"]) == {"colour": 0.0, "order": 1.0}
    assert chance([{"choices": ["a", "b"]}, {"choices": ["a", "b", "c", "d"]}]) == 0.375
    assert math.isnan(chance([{"choices": None}]))
    assert retained(0.75, full=1.0, chance=0.5) == 0.5 and math.isnan(retained(0.5, full=0.4, chance=0.5))


def test_nought_and_no_are_answers_as_one_and_yes_are():
    """A count of 0 left out, and a count of 1 asked, would be a corpus without the hardest of its counts."""
    for answer in (0, 1, 0.0, False, True, "0", "no"):
        assert is_question({"question": "how many?", "answer": answer}), answer
        clip = Clip(["a"], qa=[[{"question": "how many?", "answer": answer, "choices": [answer, "x"]}]])
        told = choose(clip, TaskConfig(), step=0)
        assert told.answers == [str(answer)] and told.tasks == ["qa"]
    empty = [{"question": "how many?"}, *({"question": "how many?", "answer": answer} for answer in (None, "", []))]
    for entry in (*empty, {"question": "", "answer": 1}, "how many?", None):
        assert not is_question(entry)


def test_an_interval_clustered_by_video_is_wider_where_questions_of_a_video_agree():
    generator = torch.Generator().manual_seed(1)
    videos = (torch.rand(40, generator=generator) < 0.5).double()
    values, clusters = videos.repeat_interleave(8), torch.arange(40).repeat_interleave(8)
    low, high = bootstrap(values, seed=0)
    clustered = bootstrap(values, seed=0, clusters=clusters)
    assert 2 < (clustered[1] - clustered[0]) / (high - low) < 3.5  # sqrt(8) in expectation
    assert clustered[0] < float(values.mean()) < clustered[1]
    assert bootstrap(values[:8], seed=0, clusters=clusters[:8]) is None  # one video
