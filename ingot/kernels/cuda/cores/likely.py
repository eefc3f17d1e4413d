"""The likeliest tokens of rows and the sums of their weights, as ingot/ir/ops_likely.py says."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ingot.kernels.cuda.cores.sample import FAR, LANES, NOTHING, REACH, distances, keys, tokens_of, weights

MOST = tl.constexpr(20)
WORDS = tl.constexpr(43)
KEPT = tl.constexpr(32)  # places of a list of MOST


@triton.jit
def nothing(words):
    """An answer of zeros."""
    place = tl.arange(0, 64)
    tl.store(words + place, tl.zeros((64,), tl.int32), place < WORDS)


@triton.jit
def likeliest(logits, words, known, high, places, WIDTH: tl.constexpr, HIGH: tl.constexpr):
    """The first tokens, from all lanes' peaks: they are in the lanes whose peaks are the first. Zeros where the first
    is no number, which is not known then."""
    lane = tl.arange(0, LANES)
    peak = tl.load(high + lane, cache_modifier=".cg")
    finite = tl.abs(tl.max(peak, 0)) < float("inf")
    tl.store(known, finite.to(tl.int32))
    if finite:
        place = tl.load(places + lane, cache_modifier=".cg")
        heads = tl.topk(keys(peak, place, place < FAR), KEPT)
        token = tl.arange(0, HIGH)[:, None] * LANES + (tokens_of(heads) % LANES)[None, :]
        there = (token < WIDTH) & (heads != NOTHING)[None, :]
        x = tl.load(logits + token, there, other=float("-inf")).to(tl.float32)
        found = tl.topk(tl.reshape(keys(x, token, there), (HIGH * KEPT,)), KEPT)
        place = tl.arange(0, KEPT)
        rank = (found >> 32).to(tl.int32)
        bits = rank ^ ((rank >> 31) & 0x7FFFFFFF)
        some = found != NOTHING
        tl.store(words + 3 + place, tl.where(some, tokens_of(found), -1), place < MOST)
        tl.store(words + 3 + MOST + place, tl.where(some, bits, 0), place < MOST)
    else:
        nothing(words)


@triton.jit
def share(logits, words, sums, first, pace, WIDTH: tl.constexpr, MINE: tl.constexpr, DEEP: tl.constexpr):
    """The sum of the weights in MINE lanes from `first` on."""
    best = tl.load(words + 3 + MOST).to(tl.float32, bitcast=True)
    lane, deep = first + tl.arange(0, MINE), tl.arange(0, DEEP)
    total = tl.zeros((DEEP, MINE), tl.int64)
    for start in range(0, tl.cdiv(WIDTH, LANES), DEEP):
        token = (start + deep)[:, None] * LANES + lane[None, :]
        x = tl.load(logits + token, token < WIDTH, other=float("-inf")).to(tl.float32)
        total += weights(distances(x, best, pace), REACH)
    tl.store(sums, tl.sum(tl.sum(total, 0), 0))


@triton.jit
def add_up(logits, words, known, sums, token, SHARES: tl.constexpr):
    """The sum of all lanes, and the chosen token's logit."""
    total = tl.sum(tl.load(sums + tl.arange(0, SHARES), cache_modifier=".cg"), 0)
    if tl.load(known) > 0:
        tl.store(words, total.to(tl.int32))
        tl.store(words + 1, (total >> 32).to(tl.int32))
        tl.store(words + 2, tl.load(logits + token).to(tl.float32).to(tl.int32, bitcast=True))
