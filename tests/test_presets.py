"""Presets: twins differ in size alone, full models have the size their header says; the mechanisms of every stage of
the flexible family run and rest as they should."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vtok import config as configuration
from vtok.budget import allocate_levels
from vtok.families import flexible
from vtok.families.flexible import Config, Model, Objective, ObjectiveConfig
from vtok.layers.begin import patch_of_token
from vtok.layers.prior import PriorConfig
from vtok.layers.projector import ProjectorConfig
from vtok.layers.sampling import draw
from vtok.quantize import QuantizerConfig
from vtok.training.optim import freeze
from vtok.types import Clip

CONFIGS = Path(__file__).parent.parent / "configs"
_FLEXIBLE = ("titok_teacher", "titok", "titok_stage2", "one_d_piece", "one_d_piece_stage2", "larp", "adaptok",
             "adaptok_scorer", "base", "halting")  # fmt: skip
_DISCRETE = ("vidtok_fsq_488", "vidtok_fsq_488_stage2", "vidtok_kl_488", "magvit2_lfq_image", "magvit2_lfq",
             "cosmos_fsq_488", "cosmos_fsq_488_stage2", "cosmos_fsq_81616", "omnitokenizer_vq_image",
             "omnitokenizer_vq", "onevae_kl", "onevae_fsq", "onevae_kl_81616", "onevae_fsq_81616", "hitvideo",
             "signvip_fsq", "phenaki")  # fmt: skip
_FLOW = ("flextok", "videoflextok", "flextok_pixel")
DISCRETE = [f"discrete/{name}" for name in _DISCRETE]
TWINS = {name: f"{name}_tiny" for name in (*(f"flexible/{name}" for name in _FLEXIBLE + _FLOW), *DISCRETE)}
TWINS |= {"temporal/tdc": "temporal/tdc_tiny"}
TWINS |= {"vqtoken/vqtoken": "vqtoken/tiny", "vqtoken/paper": "vqtoken/paper_tiny"}
TWINS |= {f"language/{name}": f"language/{name}_tiny" for name in ("c3", "langdc_stage1", "langdc_stage2", "langdc")}
TWINS |= {"language/tempo": "language/tempo_tiny"}
TWINS |= {"reducer/stage0": "reducer/tiny", "reducer/pooling": "reducer/tiny_pooling"}
FULL = list(TWINS)
# what a run reads off the files of the small language models that presets name, by their config.json
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "hf:Qwen/Qwen2.5-0.5B": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "hf:Qwen/Qwen2.5-1.5B": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=131072, tie_word_embeddings=True,
    ),
}  # fmt: skip
LANGUAGE_MODELS["hf:Qwen/Qwen2.5-1.5B-Instruct"] = LANGUAGE_MODELS["hf:Qwen/Qwen2.5-1.5B"]


def test_every_preset_has_a_twin():
    found = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*tiny*.yaml")}
    assert found == set(TWINS.values())


@pytest.mark.parametrize("name", FULL)
def test_full_presets_have_the_parameters_their_header_states(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    stated = re.search(r"^# Parameters: ([\d.]+) M", text, re.M)
    assert stated, f"{name}.yaml states no parameter count"
    config = configuration.load(CONFIGS / f"{name}.yaml").model
    if isinstance(config, ProjectorConfig):  # widths of a tower and an LLM, which a run reads off these
        widths = re.search(r"\(in_dim (\d+), embedding_dim (\d+)\)", text)
        assert widths, f"{name}.yaml does not say for which widths it counts"
        config.in_dim, config.embedding_dim, config.embedding_rms = int(widths[1]), int(widths[2]), 1.0
    if config.name == "language":
        config.lm.architecture = LANGUAGE_MODELS[config.lm.name]
        config.judge.yes, config.judge.no = [1], [2]  # read off the tokenizer
    with torch.device("meta"):
        model = configuration.load_family(config.name).Model(config)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - float(stated[1])) < 0.06


_COMMON = {
    # batch
    *(f"data.{k}" for k in ("batch_size", "val_batch_size", "num_workers", "shuffle_buffer")),
    "trainer.accumulate",
    *(f"objective.flow_{k}" for k in ("pairs", "updates")),  # how much of a batch's motion is looked at, and how long
    # steps, and places in the run that are counted in steps
    *("trainer.max_steps", "optim.warmup_steps", "objective.prior.ramp_steps", "objective.adversarial.start"),
    "objective.full_steps",
    # how the machine runs it
    *(f"trainer.{k}" for k in ("devices", "num_nodes", "strategy", "precision", "compile", "log_every", "val_every")),
    # width, depth, resolution
    *("model.size", "data.size", "objective.perceptual_side"),
    *(f"objective.adversarial.{k}" for k in ("width", "depth", "num_heads")),
    "name",
}
_PROJECTOR = _COMMON | {
    # the tower, the LLM, and how they are held
    *("model.tower.name", "model.tower.dtype"),
    *(f"objective.llm.{k}" for k in ("name", "dtype", "checkpoint")),
    # width, depth, length, and how many of each thing a shorter clip of smaller frames is given
    *(
        "data.num_frames",
        "data.text_words",
        "data.fps",
        "optim.lr",
        "model.max_tokens",
        "model.max_frames",
        "model.num_tokens",
    ),
    *("model.text_words", "model.segments.most", "model.static.tokens"),
    *(f"model.{part}.{k}" for part in ("former", "summary") for k in ("num_queries", "width", "depth", "num_heads")),
    *(f"model.places.{k}" for k in ("map_size", "hidden", "num_heads")),
    *("objective.budgets.values", "objective.budgets.max_tokens"),
}
_SIZES = {
    "flexible": _COMMON
    | {
        *(f"model.{k}" for k in ("width", "encoder_depth", "decoder_depth", "num_heads", "scorer_depth")),
        *(f"model.teacher_config.{k}" for k in ("width", "encoder_depth", "decoder_depth", "num_heads", "size")),
        *(f"objective.prior.{k}" for k in ("width", "depth", "num_heads")),
        *(f"model.halting_{k}" for k in ("depth", "width")),
        # decoded by a flow
        *("model.num_frames", "data.num_frames", "model.decoder_width", "objective.align.width", "optim.lr"),
        *("model.latents_config.conv", "objective.align.tower.size", "eval.budgets"),
        *("model.num_tokens", "model.patch"),  # of flows, held to a rule below
    },
    "discrete": _COMMON
    | {
        *("model.num_frames", "data.num_frames", "data.part_frames", "data.part_batch_sizes", "data.size_scales"),
        *(f"model.conv.{k}" for k in ("width", "num_res_blocks", "decoder_res_blocks", "mid_blocks")),
        *(f"model.transformer.{k}" for k in ("width", "num_heads", "encoder_temporal", "decoder_temporal")),
        *(f"model.transformer.{k}" for k in ("encoder_spatial", "decoder_spatial")),  # held to its letters below
        *("model.latent_channels", "optim.lr", "model.quantizer.entropy_warmup_steps"),  # held to rules below
    },
    **dict.fromkeys(("reducer", "temporal", "vqtoken"), _PROJECTOR),
    "language": _PROJECTOR
    | {
        "model.window",
        *(f"model.lm.{k}" for k in ("name", "dtype", "checkpoint", "layer")),
        "model.patches",
        "model.base.patches",
    },
}


def _resolved(name: str) -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in configuration.flatten(configuration.load(CONFIGS / f"{name}.yaml")).items():
        out |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return out


@pytest.mark.parametrize("name", FULL)
def test_twins_differ_in_size_alone(name):
    full, tiny = _resolved(name), _resolved(TWINS[name])
    changed = {key for key in full.keys() | tiny.keys() if full.get(key) != tiny.get(key)}
    sizes = _SIZES[name.partition("/")[0]]
    assert changed and changed <= sizes, changed - sizes
    teacher = {key.rpartition(".")[2]: value for key, value in tiny.items() if key.startswith("model.teacher_config.")}
    if teacher:  # a twin's teacher is the teacher's twin
        trained = _resolved("flexible/titok_teacher_tiny")
        assert all(trained[f"model.{k}"] == v for k, v in teacher.items() if k != "quantizer")


@pytest.mark.parametrize("name", ["flexible/flextok", "flexible/videoflextok", "flexible/flextok_pixel"])
def test_tokens_of_a_flow_twin_go_with_its_patches(name):
    """A decoder begins by reading tokens by place: with a patch or two for all of them, most have nothing to say."""
    ratios = []
    for each in (name, f"{name}_tiny"):
        model = configuration.load(CONFIGS / f"{each}.yaml").model
        side = model.patch * (8 if model.latents_config else 1)
        ratios.append(model.num_tokens / math.prod(-(-size // side) for size in model.size))
    assert ratios[0] <= ratios[1] <= 4, ratios


LOWEST_RATE, HIGHEST_RATE = 1e-3, 5e-3


@pytest.mark.parametrize("name", DISCRETE)
def test_sizes_of_discrete_twins_follow_rules(name):
    """Some keys are sizes only as long as they change together.

    The learning rate grows as the width shrinks, as an AdamW step changes what a layer gives by about rate x width
    (Yang et al. 2022, https://arxiv.org/abs/2203.03466): by that factor, but to 1e-3 at least, as twins take a hundred
    steps and not a hundred thousand, and to 5e-3 at most.
    """
    full, tiny = (configuration.load(CONFIGS / f"{n}.yaml") for n in (name, f"{name}_tiny"))
    conv = full.model.backbone == "conv"
    wide, narrow = (c.model.conv.width if conv else c.model.transformer.width for c in (full, tiny))
    scaled = full.optim.lr * wide / narrow
    assert tiny.optim.lr == pytest.approx(min(max(scaled, LOWEST_RATE), HIGHEST_RATE), rel=1e-6)
    if conv:
        assert tiny.model.latent_channels == full.model.latent_channels
    else:  # no bottleneck beside the quantizer's own
        assert (full.model.latent_channels, tiny.model.latent_channels) == (wide, narrow)
        for key in ("encoder_spatial", "decoder_spatial"):
            assert set(getattr(full.model.transformer, key)) == set(getattr(tiny.model.transformer, key))
    warm, short = (c.model.quantizer.entropy_warmup_steps for c in (full, tiny))  # of both or of none, and it ends
    assert bool(warm) == bool(short) and short <= min(warm, tiny.trainer.max_steps) and warm <= full.trainer.max_steps
    for config in (full, tiny):  # each clip of a part is an image or as long as the model's
        assert config.data.num_frames == config.model.num_frames and config.data.size == config.model.size
    assert len(full.data.size_scales or []) == len(tiny.data.size_scales or [])
    kinds = [[frames == c.model.num_frames for frames in c.data.part_frames or []] for c in (full, tiny)]
    assert kinds[0] == kinds[1] and full.data.weights == tiny.data.weights
    assert all(c.data.part_frames is None or set(c.data.part_frames) <= {1, c.model.num_frames} for c in (full, tiny))


SMALL = dict(num_frames=4, size=[16, 16], patch=[2, 8, 8], width=32, encoder_depth=1, decoder_depth=1, num_heads=2)


def clip(batch: int = 3, frames: int = 4) -> Clip:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, frames, 4, 4, generator=generator) * 2 - 1
    return Clip([str(i) for i in range(batch)], nn.functional.interpolate(coarse, size=(frames, 16, 16)))


@pytest.mark.parametrize(
    "quantizer",
    [
        QuantizerConfig(levels=[5, 4, 3]),
        QuantizerConfig(name="vq", codebook_size=16, dim=4),
        QuantizerConfig(name="lfq", codebook_size=16),
    ],
    ids=["fsq", "vq", "lfq"],
)
def test_teacher_stages(quantizer):
    """Stage 1 learns the teacher's ids without touching it; stage 2 reaches its decoder through soft codes."""
    torch.manual_seed(0)
    teacher = Model(Config(**SMALL, mask="full", num_tokens=4, quantizer=quantizer)).eval()
    config = Config(**SMALL, mask="full", num_tokens=4, head="teacher", teacher="somewhere")
    model = flexible.build(config, load=lambda path: teacher)
    assert torch.equal(model.teacher.registers, teacher.registers)
    again = Model(configuration.from_dict(Config, configuration.to_dict(config), where="export"))
    again.load_state_dict(model.state_dict(), strict=True)  # the config alone rebuilds it
    pixels = clip()

    class Holder(nn.Module):
        def __init__(self, objective):
            super().__init__()
            self.model, self.objective = model, objective

    first = Objective(ObjectiveConfig(l1=0.0, teacher=1.0), config)
    resting = freeze(Holder(first), configuration.OptimConfig(freeze=["model.teacher"]))
    assert model.teacher in resting
    for part in resting:
        part.eval()
    before = {n: p.clone() for n, p in model.teacher.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    seen = []
    for step in range(30):
        torch.manual_seed(0)
        loss = first(model, pixels, step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        seen.append(float(loss.report["teacher"]))
    assert seen[-1] < 0.8 * seen[0] and "l1" not in loss.report
    assert all(torch.equal(v, before[n]) for n, v in model.teacher.state_dict().items())
    model.requires_grad_(True)
    second = Objective(ObjectiveConfig(l1=0.0, l2=1.0), config)
    second(model, pixels, 0).total.backward()
    assert model.teacher.out.weight.grad.abs().sum() > 0 and model.out.weight.grad.abs().sum() > 0
    with torch.no_grad():
        tokens = model.eval().encode(pixels)
        assert model.decode(tokens, size=(16, 16)).shape == pixels.video.shape


def test_teacher_that_does_not_fit():
    teacher = Model(Config(**SMALL, mask="full", num_tokens=4))
    config = Config(**SMALL, mask="full", num_tokens=4, head="teacher", teacher="x", teacher_config={"num_tokens": 8})
    with pytest.raises(ValueError, match="num_tokens is 4, not 8"):
        flexible.build(config, load=lambda path: teacher)
    with pytest.raises(ValueError, match="objective.teacher=1.0 needs model.head=teacher"):
        Objective(ObjectiveConfig(teacher=1.0), Config(**SMALL))


def test_prior_reads_only_earlier_tokens_and_shapes_the_encoder():
    config = Config(
        **SMALL,
        mask="full",
        num_tokens=8,
        quantizer=QuantizerConfig(
            name="vq", codebook_size=16, dim=4, ema_decay=0.0, kmeans_init=False, stochastic_temperature=0.03
        ),
    )
    objective = Objective(ObjectiveConfig(prior=PriorConfig(weight=0.1, width=16, depth=1, num_heads=2)), config)
    codes = torch.randn(2, 8, 4)
    changed = codes.clone()
    changed[:, 5:] = 9.0
    assert torch.equal(objective.prior.logits(codes)[:, :6], objective.prior.logits(changed)[:, :6])
    assert not torch.equal(objective.prior.logits(codes)[:, 6:], objective.prior.logits(changed)[:, 6:])
    model = Model(config).train()
    loss = objective(model, clip(), 0)
    model.zero_grad()
    (loss.total - loss.total.detach()).backward()
    assert loss.report["prior"] > 0 and model.to_latent.weight.grad.abs().sum() > 0
    # the prior alone reaches the encoder, through the quantized vectors
    model.zero_grad()
    out = model(clip().video, torch.full((3,), 4), torch.full((3, 1), 8))
    ids = out.quantized.indices.flatten(1, 2)[..., 0]
    objective.prior(out.quantized.embeddings.flatten(1, 2), ids, lookup=model.lookup, step=0).backward()
    assert model.to_latent.weight.grad.abs().sum() > 0


def test_discriminator_rests_between_its_steps():
    from vtok.losses import AdversarialConfig

    adversarial = AdversarialConfig(weight=0.3, every=5, start=10, width=8, depth=1)
    objective = Objective(ObjectiveConfig(adversarial=adversarial), Config(**SMALL))
    assert [step for step in range(30) if not objective.idle(step)] == [10, 15, 20, 25]
    model = Model(Config(**SMALL))
    assert "adversarial" not in objective(model, clip(), 9).report
    report = objective(model, clip(), 11).report
    assert "adversarial" in report and "discriminator" not in report
    assert "discriminator" in objective(model, clip(), 15).report


def test_scorer_learns_lengths_and_allocates_within_the_budget():
    torch.manual_seed(0)
    config = Config(
        **SMALL, mask="time_block_causal", blocks=2, num_tokens=8, dropped="cut", scorer_depth=1, scorer_levels=4
    )
    model = Model(config)
    pixels = clip(4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    plain = Objective(ObjectiveConfig(), config)
    for step in range(60):  # a tokenizer for which more tokens are worth something
        loss = plain(model, pixels, step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    objective = Objective(ObjectiveConfig(scorer=True), config)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.objective = model, objective

    freeze(Holder(), configuration.OptimConfig(train_only=["model.scorer"]))
    before = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("scorer")}
    optimizer = torch.optim.AdamW(model.scorer.parameters(), 3e-4)
    errors = []
    for step in range(80):
        loss = objective(model, pixels, step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        errors.append(float(loss.report["scorer"]))
    assert sum(errors[-10:]) < 0.5 * sum(errors[10:20])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    for total in (4, 7, 12, 16):
        share = model.eval().allocate(pixels, total)
        assert share.shape == (4, 2) and int(share.sum(1).max()) <= total and int(share.min()) >= 2
        tokens = model.encode(pixels, budget=share)
        assert tokens.lengths.tolist() == share.sum(1).tolist()
    alone = torch.cat([model.allocate(Clip(["x"], pixels.video[i : i + 1]), 12) for i in range(4)])
    assert torch.equal(alone, model.allocate(pixels, 12))  # each clip has its own budget, whatever its batch
    with pytest.raises(ValueError, match="ask for 4 or more"):
        model.allocate(pixels, 3)


def test_allocation_is_the_exact_optimum():
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        cost = torch.rand(1, 3, 4, generator=generator)
        total = int(torch.randint(3, 13, (1,), generator=generator))
        got = allocate_levels(cost, torch.ones(1, 3, dtype=torch.bool), total=total * 2 + 1, unit=2)[0] // 2
        every = [(a, b, c) for a in range(4) for b in range(4) for c in range(4) if a + b + c + 3 <= total]
        best = min(float(cost[0, 0, a] + cost[0, 1, b] + cost[0, 2, c]) for a, b, c in every)
        assert abs(float(sum(cost[0, g, int(got[g]) - 1] for g in range(3))) - best) < 1e-6


def test_learned_registers_begin_where_they_are():
    """Untrained, registers read the patches they lie on."""
    torch.manual_seed(0)
    for positions in ("learned", "sincos"):
        shape = dict(SMALL, size=[32, 32], patch=[4, 8, 8], width=64, num_heads=1)
        config = Config(**shape, num_tokens=16, mask="full", norm="layer", qk_norm=False, positions=positions)
        model = Model(config)
        spots = patch_of_token(16, config.grid, 1)
        assert sorted(spots.tolist()) == list(range(16))  # one register a patch, and any prefix evenly spread
        generator = torch.Generator().manual_seed(1)
        video = torch.rand(1, 3, 4, 32, 32, generator=generator) * 2 - 1
        base = model.latents(model.chunks(video, torch.tensor([4]))).z[0, 0]
        hits = 0
        for patch in range(16):
            changed = video.clone()
            row, column = divmod(patch, 4)
            changed[..., row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] *= -1
            moved = (model.latents(model.chunks(changed, torch.tensor([4]))).z[0, 0] - base).norm(dim=-1)
            hits += int(moved.argmax()) == int((spots == patch).nonzero())
        assert hits >= 10, positions  # 1 by chance; neighbours on a grid lie close


def test_narrow_models_learn_as_wide_ones():
    """Gains stand for width: one AdamW step of a narrow model changes its output about as much as a wide one's."""
    changes = {}
    for width in (48, 192):
        torch.manual_seed(0)
        model = Model(Config(**SMALL | {"width": width}, mask="full", num_tokens=8))
        with torch.no_grad():
            before = model(clip().video, torch.full((3,), 4), torch.full((3, 1), 8)).recon
            assert before.abs().max() == 0  # the output begins at zero
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        loss = Objective(ObjectiveConfig(), model.config)(model, clip(), 0)
        loss.total.backward()
        optimizer.step()
        with torch.no_grad():
            changes[width] = float(model(clip().video, torch.full((3,), 4), torch.full((3, 1), 8)).recon.abs().mean())
    assert 0.4 < changes[48] / changes[192] < 2.5  # 0.25 without the gains


def test_ids_are_drawn_from_their_distribution():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2]).expand(20000, 4)
    share = draw(probabilities).bincount(minlength=4) / 20000
    assert (share - probabilities[0]).abs().max() < 0.02 and share[1] == 0


@pytest.mark.parametrize(
    "optim, message",
    [
        (dict(freeze=["model.encodre"]), "names begin with"),
        (dict(freeze=["model", "objective"]), "leave nothing to learn"),
    ],
)
def test_freezing_what_is_not_there(optim, message):
    holder = nn.ModuleDict({"model": nn.Linear(2, 2), "objective": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=message):
        freeze(holder, configuration.OptimConfig(**optim))
