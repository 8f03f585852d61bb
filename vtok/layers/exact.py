"""`TokenPrior`'s weights in arithmetic that gives the same numbers on every machine, with any threads, in any order.

Sums are what differs between machines, libraries and batch shapes: floats round, so order matters. Here every number
that enters a sum is a whole multiple of a power of two, small enough that float64 holds every partial sum exactly:

    weights      multiples of 2**-14, below 2**6 in size     20 bits
    activations  multiples of 2**-12, below 2**8             20 bits     -> products 40 bits, 2**12 of them fit 52
    attention    weights are integers up to 2**16, values 20 bits        -> 2**16 keys fit

What is left is done number by number with +, -, *, / and sqrt, which IEEE 754 fixes to the bit, and exp is a table of
integers. So a stream may be encoded many tokens at a time and decoded one by one, and the probabilities are equal; a
network of integers for the same reason: Balle et al. 2019, "Integer Networks for Data Compression with Latent-Variable
Models". Here nothing is trained for it: 20 bits leave the network what it was.

Letters: B rows, n tokens at once, L keys, S digits, V values of a digit, W width, H heads, D = W / H, C groups of
context.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from vtok.layers.token_prior import START, TokenPriorConfig

WEIGHT_BITS, ACTIVATION_BITS, HIDDEN_BITS = 14, 12, 10  # of fractions
CAP = 2.0**20  # of what enters a sum, in units of its grid
FINE = 1 << 10  # steps of the table of exp per unit
ATTENTION_BITS, LOGIT_BITS = 16, 24
MAX_KEYS = 1 << 16
EPS = 1e-6  # of the norms, as in `vtok.layers.transformer`
PREFIX = -1  # group of the condition's places


@lru_cache(maxsize=4)
def exp_table(bits: int) -> np.ndarray:
    """round(2**bits exp(-i / 1024)) for i = 0, 1 ... until it is 0: whole numbers, as float64.

    By integers alone: e**(-1/1024) from its series to 200 bits, then powers.
    """
    one = 1 << 200
    ratio, term = 0, one
    for n in range(1, 60):
        ratio += term if n % 2 else -term
        term = term // (n * FINE)
    out, value = [], one
    while (rounded := (value + (1 << (199 - bits))) >> (200 - bits)) > 0:
        out.append(rounded)
        value = value * ratio >> 200
    return np.array([*out, 0], np.float64)


def exp_of(x: np.ndarray, bits: int) -> np.ndarray:
    """2**bits exp(x) for x <= 0, as whole numbers."""
    table = exp_table(bits)
    steps = np.minimum(np.rint(x * -FINE), len(table) - 1)
    return table[steps.astype(np.int64)]


def snap(x: np.ndarray, bits: int = ACTIVATION_BITS) -> np.ndarray:
    """x in whole units of 2**-bits, at most 2**20 of them."""
    return np.minimum(np.maximum(np.rint(x * 2.0**bits), -CAP), CAP)


class _Linear:
    """snapped x -> x W + b. Raises: ValueError for weights outside the grid."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None, *, name: str, bits: int = ACTIVATION_BITS) -> None:
        size = float(np.abs(weight).max(initial=0.0))
        if not size * 2.0**WEIGHT_BITS <= CAP or weight.shape[0] > 4096:
            raise ValueError(
                f"{name}: weights up to {size:.3g} over {weight.shape[0]} inputs; exact sums hold {CAP / 2**14:g} over "
                "4096: train with weight decay, or a narrower prior"
            )
        self.weight = np.ascontiguousarray(np.rint(weight * 2.0**WEIGHT_BITS))  # [in, out]
        self.bias = 0.0 if bias is None else bias
        self.unit = 2.0 ** -(WEIGHT_BITS + bits)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (x @ self.weight) * self.unit + self.bias


class State:
    """Keys and values of what may still be seen, of B streams that go in step: memory of C groups, whatever came."""

    def __init__(self, depth: int, batch: int, heads: int, width: int) -> None:
        self.batch, self.length = batch, 0
        self.keys = np.zeros((depth, batch, heads, 64, width // heads))
        self.values = np.zeros_like(self.keys)
        self.group = np.zeros(64, np.int64)

    def room(self, count: int) -> None:
        while self.length + count > len(self.group):
            self.keys = np.concatenate([self.keys, np.zeros_like(self.keys)], 3)
            self.values = np.concatenate([self.values, np.zeros_like(self.values)], 3)
            self.group = np.concatenate([self.group, np.zeros_like(self.group)])

    def forget(self, before: int) -> None:
        """Drop the keys of groups below `before`; the prefix stays."""
        group = self.group[: self.length]
        keep = np.flatnonzero((group == PREFIX) | (group >= before))
        if len(keep) == self.length:
            return
        self.keys[:, :, :, : len(keep)] = self.keys[:, :, :, keep]
        self.values[:, :, :, : len(keep)] = self.values[:, :, :, keep]
        self.group[: len(keep)] = group[keep]
        self.length = len(keep)


class _Block:
    def __init__(self, tensors: dict[str, np.ndarray], prefix: str, config: TokenPriorConfig) -> None:
        def linear(name: str, bits: int = ACTIVATION_BITS) -> _Linear:
            full = f"{prefix}{name}"
            return _Linear(tensors[f"{full}.weight"].T, tensors[f"{full}.bias"], name=full, bits=bits)

        self.heads, self.context = config.num_heads, config.context_groups
        self.norm1, self.norm2 = tensors[f"{prefix}norm1.weight"], tensors[f"{prefix}norm2.weight"]
        self.q_norm, self.k_norm = tensors[f"{prefix}q_norm.weight"], tensors[f"{prefix}k_norm.weight"]
        self.qkv, self.out, self.up = linear("qkv"), linear("out"), linear("up")
        self.down = linear("down", HIDDEN_BITS)
        self.distance = tensors[f"{prefix}distance"]  # [H, C + 1]
        self.unit = 2.0 ** (-2 * ACTIVATION_BITS) * (config.width // config.num_heads) ** -0.5

    def __call__(self, x: np.ndarray, state: State, layer: int, blocked: np.ndarray | None) -> np.ndarray:
        """x [B, n, W] -> [B, n, W]; its keys enter the state, of which length and groups were set before."""
        batch, count, width = x.shape
        qkv = self.qkv(snap(normed(x, self.norm1))).reshape(batch, count, 3, self.heads, width // self.heads)
        q = snap(normed(qkv[:, :, 0], self.q_norm)).transpose(0, 2, 1, 3)  # [B, H, n, D]
        first, last = state.length - count, state.length
        state.keys[layer, :, :, first:last] = snap(normed(qkv[:, :, 1], self.k_norm)).transpose(0, 2, 1, 3)
        state.values[layer, :, :, first:last] = snap(qkv[:, :, 2]).transpose(0, 2, 1, 3)
        group = state.group[:last]
        apart = np.where(group == PREFIX, self.context, np.clip(group[first:, None] - group, 0, self.context))  # [n, L]
        scores = (q @ state.keys[layer, :, :, :last].swapaxes(-1, -2)) * self.unit + self.distance[:, apart]
        if blocked is not None:
            scores = np.where(blocked, -np.inf, scores)
        scores = scores - scores.max(-1, keepdims=True)
        weights = exp_of(np.maximum(scores, -64.0), ATTENTION_BITS)  # [B, H, n, L]
        seen = (weights @ state.values[layer, :, :, :last]) / (weights.sum(-1, keepdims=True) * 2.0**ACTIVATION_BITS)
        x = x + self.out(snap(seen.transpose(0, 2, 1, 3).reshape(batch, count, width)))
        hidden = np.maximum(self.up(snap(normed(x, self.norm2))), 0.0)
        return x + self.down(snap(hidden * hidden, HIDDEN_BITS))


def normed(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """RMS norm over the last axis; its mean square is of x on the grid."""
    units = snap(x)
    mean = (units * units).sum(-1, keepdims=True) * (2.0 ** (-2 * ACTIVATION_BITS) / x.shape[-1])
    return x / np.sqrt(mean + EPS) * gain


class ExactPrior:
    """The prior's next-token weights, as whole numbers. Inputs and outputs are numpy arrays.

    tensors: `TokenPrior.state_dict()` as arrays. Raises: ValueError where weights are too large for exact sums.
    """

    def __init__(self, config: TokenPriorConfig, tensors: dict[str, np.ndarray]) -> None:
        t = {name: value.astype(np.float64) for name, value in tensors.items()}
        self.config, c = config, config
        self.offsets = np.cumsum([0, *c.radices])[:-1]
        # embeddings are summed over digits: on a grid, so that the order of the sum is free
        self.previous, self.above = (np.rint(t[f"{n}.weight"] * 2.0**20) * 2.0**-20 for n in ("previous", "above"))
        self.rank, self.phase = t["rank.weight"], t["phase.weight"]
        self.scale = 1.0 + t["scale.weight"]
        self.words, self.word_place = t["words.weight"], t["word_place.weight"]
        self.blocks = [_Block(t, f"blocks.{i}.", c) for i in range(c.depth)]
        self.norm = t["norm.weight"]
        self.head_in = _Linear(t["head_in.weight"].T, t["head_in.bias"], name="head_in")
        self.chain = np.rint(t["chain.weight"] * 2.0**20) * 2.0**-20 if c.digits == "chain" else None
        self.head_out = [
            _Linear(t[f"head_out.{s}"], None, name=f"head_out.{s}", bits=HIDDEN_BITS) for s in range(len(c.radices))
        ]
        self.base = np.split(t["base"], np.cumsum(c.radices)[:-1], axis=1)

    def start(self, words: list[int] | None = None, *, batch: int = 1) -> State:
        """A state that has read the prefix: START, then `words`."""
        c = self.config
        state = State(c.depth, batch, c.num_heads, c.width)
        prefix = [START, *(words or [])][: c.max_words + 1]
        x = self.words[prefix] + self.word_place[: len(prefix)]
        self._run(np.broadcast_to(x, (batch, *x.shape)), np.full(len(prefix), PREFIX), state)
        return state

    def hidden(
        self, state: State, *, previous: np.ndarray, above: np.ndarray, group: np.ndarray, rank: np.ndarray
    ) -> np.ndarray:
        """[B, n, W] before each of n tokens, in groups that rise from call to call.

        previous, above: digits [B, n, S], -1 where there is none. group, rank: [n].
        """
        c = self.config
        row = np.minimum(rank, c.max_rank - 1)
        x = self.rank[row] + self.phase[np.where(group == 0, 0, 1 + group % c.blocks)]  # [n, W]
        x = x + self._told(self.previous, previous) * self.scale[row, : c.width]
        x = x + self._told(self.above, above) * self.scale[row, c.width :]
        state.forget(int(group[0]) - c.context_groups + 1)
        return normed(self._run(x, group, state), self.norm)

    def _told(self, table: np.ndarray, digits: np.ndarray) -> np.ndarray:
        there = digits[..., :1] >= 0
        return np.where(there, table[np.where(there, digits + self.offsets, 0)].sum(-2), table[-1])

    def _run(self, x: np.ndarray, group: np.ndarray, state: State) -> np.ndarray:
        count = len(group)
        if state.length + count > MAX_KEYS:
            raise ValueError(
                f"{state.length + count} tokens in {self.config.context_groups} groups of context: exact sums hold "
                f"{MAX_KEYS}; train the prior with fewer --context-groups"
            )
        state.room(count)
        state.group[state.length : state.length + count] = group
        state.length += count
        blocked = None
        if count > 1:
            keys, order = state.group[: state.length], np.arange(state.length)
            late = order > order[state.length - count :, None]
            far = (keys != PREFIX) & (group[:, None] - keys >= self.config.context_groups)
            blocked = late | far
        for layer, block in enumerate(self.blocks):
            x = block(x, state, layer, blocked)
        return x

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """[..., S, M]: what the digits' heads read of the hidden state."""
        c = self.config
        return self.head_in(snap(hidden)).reshape(*hidden.shape[:-1], len(c.radices), c.head_width)

    def logits(self, inner: np.ndarray, digits: np.ndarray, rank: np.ndarray, at: int) -> np.ndarray:
        """[..., V] of digit `at`, given `head`'s [..., S, M] and the digits [..., at or more] before it."""
        x = inner[..., at, :]
        if self.chain is not None and at:
            x = x + self.chain[digits[..., :at] + self.offsets[:at]].sum(-2)
        x = np.maximum(x, 0.0)
        return self.head_out[at](snap(x * x, HIDDEN_BITS)) + self.base[at][np.minimum(rank, self.config.max_rank - 1)]


def frequencies(logits: np.ndarray) -> np.ndarray:
    """Whole numbers [..., V] of 1 or more, in proportion to exp(logits)."""
    return exp_of(logits - logits.max(-1, keepdims=True), LOGIT_BITS) + 1.0


def cost(frequency: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """Bits [...] of these digits: -log2 of their share of frequencies [..., V]."""
    chosen = np.take_along_axis(frequency, digits[..., None], -1)[..., 0]
    return np.log2(frequency.sum(-1)) - np.log2(chosen)


def largest(config: TokenPriorConfig) -> float:
    """Bits of the largest sum there can be; below 53, or sums would not be exact."""
    fan_in = max(config.width, config.hidden, config.head_width)
    return max(40 + math.log2(fan_in), 20 + ATTENTION_BITS + math.log2(MAX_KEYS))
