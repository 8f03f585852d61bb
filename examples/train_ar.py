"""A language model of video tokens: trained on what `vtok tokenize` wrote, measured in bits a token, and sampled.

python examples/train_ar.py TOKENS --model EXPORT --out sample.mp4        (docs/tokenize.md shows what comes before)

TOKENS holds train/ and val/, of one id a token. With --checkpoint FILE a later call goes on where this one ended.
"""

import argparse
import math
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import vtok
from vtok.coding.token_coding import decode_ids
from vtok.data.encode import write_video
from vtok.data.token_reader import iter_token_samples
from vtok.data.token_shards import TokenLoader, TokenShards

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("tokens", type=Path)
parser.add_argument("--model", required=True, help="the export that made the tokens")
parser.add_argument("--out", default="sample.mp4")
parser.add_argument("--checkpoint", type=Path)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--depth", type=int, default=4)
args = parser.parse_args()
torch.manual_seed(0)


def bits(batch):
    """-log2 p of every token of a batch of clips; the id that begins a clip is given, not predicted."""
    targets = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], -100)
    nats = F.cross_entropy(net(batch.ids[:, :-1]).logits.transpose(1, 2), targets, reduction="none")
    return nats[targets >= 0] / math.log(2)


tokenizer = vtok.load(args.model)
settings = {"mode": "clips", "batch_size": 16, "model_id": tokenizer.shipped.model_id}  # another model's ids: an error
train, val = TokenShards(args.tokens / "train", **settings), TokenShards(args.tokens / "val", epochs=1, **settings)
(begin,) = train.tokenizer.codebook_sizes  # ids 0 ... begin - 1, and one more that begins every clip
longest = max(train.index.longest + val.index.longest) + 1
shape = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_hidden_layers": args.depth}
heads = {"num_attention_heads": 4, "vocab_size": begin + 1, "max_position_embeddings": longest}
net = LlamaForCausalLM(LlamaConfig(**shape, **heads))
optimizer = torch.optim.AdamW(net.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1)
loader = TokenLoader(train, num_workers=1)
if args.checkpoint and args.checkpoint.exists():
    state = torch.load(args.checkpoint, weights_only=True)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["loader"])  # the next batch is the one after the last, in the middle of an epoch

ids = torch.cat([b.ids[b.mask] for b in TokenShards(args.tokens / "train", epochs=1, begin=False, **settings)])
share = torch.bincount(ids).double() / len(ids)
print(
    f"{len(ids)} training tokens; entropy of their ids: {float(torch.special.entr(share).sum()) / math.log(2):.3f} bits"
)
for batch in islice(loader, args.steps - loader.batches):
    loss = bits(batch).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    if loader.batches % 50 == 0:
        print(f"step {loader.batches}: {float(loss.detach()):.3f} bits a token", flush=True)
if args.checkpoint:
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
    torch.save(state, args.checkpoint)
net.eval()
with torch.no_grad():
    held_out = torch.cat([bits(batch) for batch in TokenLoader(val)])
print(f"held out: {float(held_out.mean()):.3f} bits a token, over {len(held_out)} tokens")

like = next(iter_token_samples(args.tokens / "val")).tokens  # its length, size and rate
prompt, count = torch.tensor([[begin]]), sum(like.groups)
sampling = {"do_sample": True, "min_new_tokens": count, "max_new_tokens": count, "suppress_tokens": [begin]}
made = net.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=begin, pad_token_id=begin, **sampling)
frames = decode_ids(tokenizer, made[0, 1:], groups=like.groups, frames=like.frames, size=(like.size[0], like.size[1]))
write_video(args.out, torch.from_numpy(frames), fps=like.fps or 1)
print(f"{args.out}: {len(frames)} frames from {count} sampled tokens")
