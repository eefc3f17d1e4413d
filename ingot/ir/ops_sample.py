"""Sample: a token for each row of logits, drawn in whole numbers, so that the same logits give the same token anywhere.

How far a token is from its row's likeliest, in halvings of its probability, is a fixed-point number (`distances`), from
which its weight follows in integers alone (`weights`): sums are exact, in whatever order they are added. The numbers
that decide come from a counter (`number`). All of it is repeated bit by bit by ingot/kernels/cuda/cores/sample.py.

A row's draw (`DRAW` words, int32): the state of its counter in two words, the pace (float32) of its distances, 0 for
the likeliest token, then how many tokens top_k leaves, how much of the whole top_p leaves (in 2^-32), 0 for all, the
distance at which min_p ends, the first and the end of its edits, and the number of its mask, from 1 on, or 0.

An edit (`EDIT` words): a token, then in float32 what is added to its logit, by what the sum is divided where it is
positive, elsewhere by the inverse, and what is taken away from that. A row has at most one for a token. A mask has a
bit for each token, 1 where it is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count

import numpy as np

from ingot.errors import GraphError
from ingot.ir.elementwise import Array, wide
from ingot.ir.ops_table import TensorType, op

DRAW, EDIT = 9, 4
LANES = 2048  # token t is in lane t % LANES, and drawn in the order of lanes
UNIT = 1 << 24  # of distance: one halving
REACH = 40 * UNIT  # tokens 2^40 times less likely than the first are not drawn
# 2^g for 0 <= g < 1 as sum of c_n g^n, in 2^-30: relative error 8e-8 (weighted least squares, reweighted by Lawson).
POWERS = (2016019, 9652218, 59943112, 257862938, 744267456, 1073741743)
LARGEST_PACE, ALL_64 = 1e30, (1 << 64) - 1
_AT_ONCE = 1 << 14  # elements that stay in the cache
_GOLDEN, _TURN = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95


# -- numbers ----------------------------------------------------------------------------------------------------------
def mixed(value: int) -> int:
    """SplitMix64's finisher (Steele, Lea, Flood 2014), of 64 bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & ALL_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & ALL_64
    return value ^ (value >> 31)


def start_of(seed: int) -> int:
    """Where a request's counter begins."""
    return mixed(seed & ALL_64)


def state_of(start: int, place: int) -> int:
    """The counter at a place of an answer, which can be had alone."""
    return (start + (place + 1) * _GOLDEN) & ALL_64


def at_places(rows_RD: Array, places_R: Array) -> Array:
    """Draws of some places: those given have their requests' starts in the place of states."""
    rows_RD = rows_RD.copy()
    starts = np.ascontiguousarray(rows_RD[:, :2]).view(np.uint64)[:, 0]
    states = starts + (places_R.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    rows_RD[:, :2] = states[:, None].view(np.int32)
    return rows_RD


def number(state: int, turn: int) -> int:
    """64 random bits: those of a draw's attempt number `turn`."""
    return mixed((state + turn * _TURN) & ALL_64)


# -- draws ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Draw:
    """How a row's token is drawn, in the numbers that decide. top_k, top_p 0: all; least: the distance for min_p."""

    state: int
    pace: float
    top_k: int = 0
    top_p: int = 0
    least: int = REACH - 1
    edits: tuple[int, int] = (0, 0)
    mask: int = 0

    def packed(self) -> Array:
        """As a row of int32 [DRAW]."""
        row = np.zeros(DRAW, np.int32)
        row[:2] = np.array([self.state], np.uint64).view(np.int32)
        row[2:3] = np.array([self.pace], np.float32).view(np.int32)
        row[3:] = self.top_k, np.array(self.top_p, np.uint32).view(np.int32), self.least, *self.edits, self.mask
        return row

    @staticmethod
    def read(row: Array) -> Draw:
        """Of a row of int32."""
        row = np.ascontiguousarray(row)
        state, pace = int(row[:2].view(np.uint64)[0]), float(row[2:3].view(np.float32)[0])
        share, (least, first, end, mask) = int(row[4:5].view(np.uint32)[0]), map(int, row[5:])
        return Draw(state, pace, int(row[3]), share, least, (first, end), mask)


def draw_of(state: int, temperature: float, top_k: int | None, top_p: float, min_p: float) -> Draw:
    """Of a request's parameters. One token left by top_k is the likeliest."""
    if temperature == 0 or top_k == 1:
        return Draw(state, 0.0)
    pace = min(UNIT / math.log(2) / temperature, LARGEST_PACE)
    share = min(max(round(top_p * 2**32), 1), 2**32) % 2**32
    least = min(int(-math.log2(min_p) * UNIT), REACH - 1) if min_p > 0 else REACH - 1
    return Draw(state, float(np.float32(pace)), min(top_k or 0, 2**31 - 1), share, least)


def edits_of(tokens: Array, added: Array, divided: Array, taken: Array) -> Array:
    """Edits [E, EDIT] of different tokens."""
    edits = np.empty((len(tokens), EDIT), np.int32)
    edits[:, 0] = tokens
    edits[:, 1:] = np.stack([added, divided, taken], 1).astype(np.float32).view(np.int32)
    return edits


# -- one row ----------------------------------------------------------------------------------------------------------
def distances(logits: Array, best: np.float32, pace: np.float32) -> Array:
    """How far each is from the best, int32 in UNITs of which pace makes a logit; at most REACH."""
    with np.errstate(over="ignore", invalid="ignore"):
        far = (best - logits) * pace
    return np.minimum(far, np.float32(REACH), out=far).astype(np.int32)


def weights(distance: Array) -> Array:
    """2^(40 - distance) as whole numbers, uint64, 0 from REACH on."""
    whole = np.empty(len(distance), np.uint64)
    for start in range(0, len(distance), _AT_ONCE):
        part = distance[start : start + _AT_ONCE]
        whole[start : start + _AT_ONCE] = _powers(part) >> (part >> 24).astype(np.uint64)
    return whole


def _powers(distance: Array) -> Array:
    """2^(40 - the distance's fraction)"""
    part = (~distance & (UNIT - 1)).astype(np.uint64)
    part <<= np.uint64(8)
    power = part * np.uint64(POWERS[0])
    for following in POWERS[1:-1]:
        power >>= np.uint64(32)
        power += np.uint64(following)
        power *= part
    power >>= np.uint64(32)
    power += np.uint64(POWERS[-1])
    power <<= np.uint64(9)
    return power


def adjusted(logits_V: Array, edits: Array, mask: Array | None = None) -> Array:
    """The logits after edits, -inf where the mask has no bit or none that is 1; float32."""
    changed = logits_V.copy()
    if len(edits):
        tokens, (added, divided, taken) = edits[:, 0], np.ascontiguousarray(edits[:, 1:]).view(np.float32).T
        scores = changed[tokens] + added
        changed[tokens] = scores / np.where(scores > 0, divided, np.float32(1) / divided) - taken
    if mask is not None:
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(changed)]
        changed[: len(allowed)][allowed == 0] = -np.inf
        changed[len(allowed) :] = -np.inf
    return changed


def sampled(logits_V: Array, draw: Draw) -> int:
    """The token of one row of float32; -1 where the best is no number or infinite.

    top_k keeps the first k and those that are as likely as the last of them; of these top_p keeps those before which
    less than its share lies; of these min_p those not too far from the best. A token is drawn of what top_k left, and
    again, of those before it, while it is one that the other two do not keep.
    """
    first = int(logits_V.argmax())  # the place of a NaN, if there is one
    best = logits_V[first]
    if not np.isfinite(best):
        return -1
    if draw.pace == 0:
        return first
    distance = distances(logits_V, best, np.float32(draw.pace))
    limit = REACH if draw.top_p else draw.least + 1  # which of two thresholds is the nearer one matters to top_p alone
    if 0 < draw.top_k < len(distance):
        limit = min(int(np.partition(distance, draw.top_k - 1)[draw.top_k - 1]) + 1, limit)
    return _drawn(distance, limit, draw)


def _drawn(distance: Array, limit: int, draw: Draw) -> int:
    """The token that the draw finds among those nearer than the limit."""
    token, total = _attempt(distance, limit, number(draw.state, 0))
    enough = max(total * draw.top_p >> 32, 1)
    for turn in count(1):
        far = int(distance[token])
        if far <= draw.least and (far == 0 or not draw.top_p):
            break
        another, before = _attempt(distance, min(far, draw.least + 1), number(draw.state, turn))
        if far <= draw.least and before < enough:
            break
        token = another
    return token


def _attempt(distance: Array, limit: int, bits: int) -> tuple[int, int]:
    """(a token nearer than the limit, by random bits as shares of the running sum lane by lane; the weight of all)"""
    if limit == REACH:
        return _of_all(weights(distance), bits)
    near = np.flatnonzero(distance < limit)
    near = near[np.argsort((near % LANES).astype(np.uint16), kind="stable")]
    running = np.cumsum(weights(distance[near]))
    total = int(running[-1])
    return int(near[np.searchsorted(running, np.uint64(bits * total >> 64), side="right")]), total


def _of_all(weight: Array, bits: int) -> tuple[int, int]:
    """The same, of all tokens: only the lane that is found is put in order."""
    running = np.cumsum(sums := by_lanes(weight))
    total = int(running[-1])
    target = bits * total >> 64
    lane = int(np.searchsorted(running, np.uint64(target), side="right"))
    target -= int(running[lane] - sums[lane])
    row = int(np.searchsorted(np.cumsum(weight[lane::LANES]), np.uint64(target), side="right"))
    return row * LANES + lane, total


def by_lanes(weight: Array) -> Array:
    """The sum of each lane."""
    whole = len(weight) // LANES * LANES
    sums: Array = weight[:whole].reshape(-1, LANES).sum(0)
    sums[: len(weight) - whole] += weight[whole:]
    return sums


def _sample_type(logits: TensorType, draws: TensorType, edits: TensorType | None = None,
                 masks: TensorType | None = None) -> TensorType:  # fmt: skip
    words = -(-int(logits.shape[1]) // 32) if isinstance(logits.shape[1], int) else 0
    for name, given, width in (("draw", draws, DRAW), ("edit", edits, EDIT), ("mask", masks, words)):
        if given is not None and (given.dtype != "int32" or given.shape[1:] != (width,)):
            raise GraphError(f"Sample: a {name} is {width} int32, these are {given.dtype} {given.shape}")
    return TensorType("int32", logits.shape[:1])


@op("Sample", "logits draws edits? masks?", _sample_type)
def sample(logits_RV: Array, draws_RD: Array, edits: Array | None = None, masks: Array | None = None) -> Array:
    """A token [R] of each row, int32, as its draw says: the likeliest or a random one; without draws the likeliest of
    all rows; -1 where that is no number"""
    draws_RD = draws_RD if len(draws_RD) else np.zeros((len(logits_RV), DRAW), np.int32)
    found = [
        _row(logits, Draw.read(draw), edits, masks) for logits, draw in zip(wide(logits_RV), draws_RD, strict=True)
    ]
    return np.array(found, np.int32)


def _row(logits_V: Array, draw: Draw, edits: Array | None, masks: Array | None) -> int:
    own = edits[slice(*draw.edits)] if edits is not None else np.zeros((0, EDIT), np.int32)
    mask = masks[draw.mask - 1] if masks is not None and draw.mask else None
    return sampled(adjusted(logits_V, own, mask) if len(own) or mask is not None else logits_V, draw)
