"""Drawing tokens, bit by bit as ingot/ir/ops_sample.py says.

A row is drawn in three steps, each by some blocks of its own that have their share of its lanes: `peaks` (the highest
logits of lanes), `weigh` (sums of lanes, the first attempt), `judge` (whether the attempt is kept; others). The last
block of a row that is done with a step goes on alone. What it finds is in `info` [R, 4]: the best logit's bits, the
distance at which what may be drawn ends, 0 once the token is there, then the attempt's distance and place.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

LANES = tl.constexpr(2048)
REACH = tl.constexpr(40 * (1 << 24))
FAR = tl.constexpr(2147483647)
EDIT = tl.constexpr(4)
EDITS = tl.constexpr(256)  # at once
INFO = tl.constexpr(4)
NOTHING = tl.constexpr(-(1 << 63))


# -- what ops_sample.py has too ---------------------------------------------------------------------------------------
@triton.jit
def distances(x, best, pace):
    """How far each is from the best; neither step can be joined with another."""
    return tl.minimum((best - x) * pace, 671088640.0).to(tl.int32)


@triton.jit
def _powers(part, c0: tl.constexpr, c1: tl.constexpr):
    return tl.umulhi(part, tl.full(part.shape, c0, tl.uint32)) + tl.full(part.shape, c1, tl.uint32)


@triton.jit
def weights(distance, limit):
    """2^(40 - distance) where that is below the limit, else 0; int64."""
    part = ((~distance & 0xFFFFFF) << 8).to(tl.uint32, bitcast=True)
    power = _powers(part, 2016019, 9652218)
    power = tl.umulhi(part, power) + tl.full(part.shape, 59943112, tl.uint32)
    power = tl.umulhi(part, power) + tl.full(part.shape, 257862938, tl.uint32)
    power = tl.umulhi(part, power) + tl.full(part.shape, 744267456, tl.uint32)
    power = tl.umulhi(part, power) + tl.full(part.shape, 1073741743, tl.uint32)
    whole = (power.to(tl.int64) << 9) >> (distance >> 24).to(tl.int64)
    return tl.where(distance < limit, whole, 0)


@triton.jit
def _mixed(value):
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def number(draw, turn):
    """64 random bits for an attempt."""
    low, high = tl.load(draw).to(tl.uint32, bitcast=True), tl.load(draw + 1).to(tl.uint32, bitcast=True)
    state = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return _mixed(state + turn.to(tl.uint64) * 0xD1342543DE82EF95)


@triton.jit
def pace_of(draw):
    """The pace of its distances."""
    return tl.load(draw + 2).to(tl.float32, bitcast=True)


# -- the likeliest ----------------------------------------------------------------------------------------------------
@triton.jit
def keys(x, token, there):
    """Whole numbers whose order is that of logits, and of equal ones the first token is the largest."""
    x = tl.where(x == 0, 0.0, x)  # of either sign
    bits = x.to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (rank.to(tl.int64) << 32) | (token ^ FAR).to(tl.int64)
    return tl.where(there & (x > float("-inf")), key, tl.full(x.shape, NOTHING, tl.int64))


@triton.jit
def tokens_of(key):
    """Whose keys these are."""
    return (key & FAR).to(tl.int32) ^ FAR


@triton.jit
def leader(logits, row, first, WIDTH: tl.constexpr, MINE: tl.constexpr):
    """The key of the likeliest of MINE tokens from `first` on; NaN counts as infinite."""
    token = first + tl.arange(0, MINE)
    x = tl.load(logits + row * WIDTH + token, token < WIDTH, other=float("-inf")).to(tl.float32)
    return tl.max(keys(tl.where(x == x, x, float("inf")), token, token < WIDTH), 0)


@triton.jit
def elect(tokens, leaders, row, PARTS: tl.constexpr, ROOM: tl.constexpr):
    """The row's token, of its blocks' keys; -1 where its logit is no number."""
    part = tl.arange(0, ROOM)
    key = tl.max(tl.load(leaders + part, part < PARTS, other=NOTHING, cache_modifier=".cg"), 0)
    finite = (key != NOTHING) & ((key >> 32) < 0x7F800000)
    tl.store(tokens + row, tl.where(finite, tokens_of(key), -1))


# -- edits and masks --------------------------------------------------------------------------------------------------
@triton.jit
def edit(logits, edits, kept, draw, row, first, WIDTH: tl.constexpr, MINE: tl.constexpr):
    """Change logits of MINE lanes from `first` on where they are; what they were is kept [E]."""
    end = tl.load(draw + 7)
    for start in range(tl.load(draw + 6), end, EDITS):
        each = start + tl.arange(0, EDITS)
        token = tl.load(edits + each * EDIT, each < end, other=0)
        lane = token % LANES
        mine = (each < end) & (lane >= first) & (lane < first + MINE)
        x = tl.load(logits + row * WIDTH + token, mine, other=0.0)
        tl.store(kept + each, x, mine)
        added, divided, taken = (
            _number(edits, each, 1, mine),
            _number(edits, each, 2, mine),
            _number(edits, each, 3, mine),
        )
        score = x + added
        score = tl.div_rn(
            score, tl.where(score > 0, divided, tl.div_rn(tl.full(score.shape, 1.0, tl.float32), divided))
        )
        tl.store(logits + row * WIDTH + token, score - taken, mine)
    tl.debug_barrier()


@triton.jit
def _number(edits, each, word: tl.constexpr, inside):
    return tl.load(edits + each * EDIT + word, inside, other=0).to(tl.float32, bitcast=True)


@triton.jit
def restore(logits, edits, kept, draw, row, WIDTH: tl.constexpr):
    """Undo a row's edits."""
    end = tl.load(draw + 7)
    for start in range(tl.load(draw + 6), end, EDITS):
        each = start + tl.arange(0, EDITS)
        token = tl.load(edits + each * EDIT, each < end, other=0)
        tl.store(
            logits + row * WIDTH + token, tl.load(kept + each, each < end, other=0.0, cache_modifier=".cg"), each < end
        )


@triton.jit
def seen(logits, masks, draw, row, token, inside, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Logits of a block of tokens, -inf for those that are not to be."""
    if MASKED:
        word = (tl.load(draw + 8) - 1) * tl.cdiv(WIDTH, 32) + (token >> 5)
        inside = inside & (((tl.load(masks + word, inside, other=0) >> (token & 31)) & 1) != 0)
    return tl.load(logits + row * WIDTH + token, inside, other=float("-inf")).to(tl.float32)


# -- peaks ------------------------------------------------------------------------------------------------------------
@triton.jit
def peaks(logits, masks, draw, high, places, row, first, WIDTH: tl.constexpr, MINE: tl.constexpr, DEEP: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """The highest logit of each of MINE lanes from `first` on, and where it is; NaN counts as infinite."""
    ROWS: tl.constexpr = (DEEP + MASKED) // (1 + MASKED)  # masks take registers
    lane, deep = first + tl.arange(0, MINE), tl.arange(0, ROWS)
    best = tl.full((ROWS, MINE), float("-inf"), tl.float32)
    at = tl.full((ROWS, MINE), FAR, tl.int32)
    for start in range(0, tl.cdiv(WIDTH, LANES), ROWS):
        token = (start + deep)[:, None] * LANES + lane[None, :]
        x = seen(logits, masks, draw, row, token, token < WIDTH, WIDTH, MASKED)
        x = tl.where(x == x, x, float("inf"))
        at = tl.where(x > best, token, at)
        best = tl.maximum(best, x)
    peak = tl.max(best, 0)
    place = tl.min(tl.where(best == peak[None, :], at, FAR), 0)
    tl.store(high + row * LANES + lane, peak)
    tl.store(places + row * LANES + lane, place)


@triton.jit
def settle(logits, masks, draw, tokens, high, places, info, row, WIDTH: tl.constexpr, SOME: tl.constexpr,
           HIGH: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """From the peaks of all lanes: the token where the likeliest is wanted, else where what may be drawn ends."""
    lane = tl.arange(0, LANES)
    peak = tl.load(high + row * LANES + lane, cache_modifier=".cg")
    best = tl.max(peak, 0)
    pace = pace_of(draw)
    known = tl.abs(best) < float("inf")
    limit = 0
    if (pace == 0) | (known == 0):
        place = tl.load(places + row * LANES + lane, cache_modifier=".cg")
        place = tl.min(tl.where(peak == best, place, FAR), 0)
        tl.store(tokens + row, tl.where(known, place, -1))
    else:
        wanted, share = tl.load(draw + 3), tl.load(draw + 4)
        limit = tl.where(share == 0, tl.load(draw + 5) + 1, REACH)
        if (wanted > 0) & (wanted < WIDTH):
            near = distances(peak, best, pace)
            last = _last(logits, masks, draw, places, row, near, best, pace, wanted, WIDTH, SOME, HIGH, MASKED)
            limit = tl.minimum(last + 1, limit)
    tl.store(info + row * INFO, best.to(tl.int32, bitcast=True))
    tl.store(info + row * INFO + 1, limit)


@triton.jit
def _last(logits, masks, draw, list, row, nearest, best, pace, wanted, WIDTH: tl.constexpr, SOME: tl.constexpr,
          HIGH: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Distance of the token number `wanted`, by distance: it is in a lane whose nearest is among the nearest `wanted`.

    list [R, LANES]: memory for the numbers of those lanes, which are looked at SOME at a time, two bits in each round.
    """
    found = 0
    for step in range(15):
        quarter = 1 << (28 - 2 * step)
        found += quarter * _digit(_below(nearest, found, quarter), tl.minimum(wanted, LANES))
    lane = tl.arange(0, LANES)
    among = nearest <= found
    tl.debug_barrier()
    tl.store(list + row * LANES + tl.cumsum(among.to(tl.int32), 0) - 1, lane, among)
    tl.debug_barrier()
    count = tl.sum(among.to(tl.int32), 0)
    far = _columns(logits, masks, draw, list, row, 0, count, best, pace, WIDTH, SOME, HIGH, MASKED)
    found = 0
    for step in range(15):
        quarter = 1 << (28 - 2 * step)
        below = _below(far, found, quarter)
        for start in range(SOME, count, SOME):
            more = _columns(logits, masks, draw, list, row, start, count, best, pace, WIDTH, SOME, HIGH, MASKED)
            below += _below(more, found, quarter)
        found += quarter * _digit(below, wanted)
    return found


@triton.jit
def _below(far, found, quarter):
    """How many are nearer than found + quarter, + 2 quarters, + 3 quarters: 20 bits each."""
    first, second, third = far < found + quarter, far < found + 2 * quarter, far < found + 3 * quarter
    return tl.sum(first.to(tl.int64) | (second.to(tl.int64) << 20) | (third.to(tl.int64) << 40), 0)


@triton.jit
def _digit(below, wanted):
    """How many of these three are fewer than wanted."""
    fewer = ((below & 0xFFFFF) < wanted).to(tl.int32) + (((below >> 20) & 0xFFFFF) < wanted).to(tl.int32)
    return fewer + ((below >> 40) < wanted).to(tl.int32)


@triton.jit
def _columns(logits, masks, draw, list, row, start, count, best, pace, WIDTH: tl.constexpr, SOME: tl.constexpr,
             HIGH: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Distances of all tokens of SOME listed lanes, FAR where there is none."""
    number, deep = start + tl.arange(0, SOME), tl.arange(0, HIGH)
    lane = tl.load(list + row * LANES + number, number < count, other=0, cache_modifier=".cg")
    token = deep[:, None] * LANES + lane[None, :]
    inside = (token < WIDTH) & (number < count)[None, :]
    x = seen(logits, masks, draw, row, token, inside, WIDTH, MASKED)
    return tl.reshape(tl.where(inside, distances(x, best, pace), FAR), (SOME * HIGH,))


# -- weigh ------------------------------------------------------------------------------------------------------------
@triton.jit
def summed(logits, masks, draw, row, first, best, pace, limit, WIDTH: tl.constexpr, MINE: tl.constexpr,
           DEEP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Weights below the limit, added up by lanes: MINE from `first` on."""
    ROWS: tl.constexpr = (DEEP + MASKED) // (1 + MASKED)
    lane, deep = first + tl.arange(0, MINE), tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, MINE), tl.int64)
    for start in range(0, tl.cdiv(WIDTH, LANES), ROWS):
        token = (start + deep)[:, None] * LANES + lane[None, :]
        x = seen(logits, masks, draw, row, token, token < WIDTH, WIDTH, MASKED)
        sums += weights(distances(x, best, pace), limit)
    return tl.sum(sums, 0)


@triton.jit
def drawn(logits, masks, draw, row, sums, limit, best, pace, turn, WIDTH: tl.constexpr, HIGH: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """(token, its distance) that an attempt finds among weights below the limit, whose sums by lanes these are."""
    total = tl.sum(sums, 0)
    target = tl.umulhi(number(draw, turn), total.to(tl.uint64)).to(tl.int64)
    running = tl.cumsum(sums, 0)
    lane = tl.sum((running <= target).to(tl.int32), 0)
    target -= tl.max(tl.where(running <= target, running, 0), 0)
    token = tl.arange(0, HIGH) * LANES + lane
    x = seen(logits, masks, draw, row, token, token < WIDTH, WIDTH, MASKED)
    far = distances(x, best, pace)
    running = tl.cumsum(weights(far, limit), 0)
    deep = tl.sum((running <= target).to(tl.int32), 0)
    return deep * LANES + lane, tl.sum(tl.where(tl.arange(0, HIGH) == deep, far, 0), 0)


@triton.jit
def begin(logits, masks, draw, tokens, info, enough, sums, row, WIDTH: tl.constexpr, HIGH: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """The first attempt, which is the token where nothing can be against it."""
    best, limit = tl.load(info + row * INFO).to(tl.float32, bitcast=True), tl.load(info + row * INFO + 1)
    share = tl.load(draw + 4).to(tl.uint32, bitcast=True).to(tl.uint64)
    least = tl.load(draw + 5)
    total = tl.sum(sums, 0)
    token, far = drawn(logits, masks, draw, row, sums, limit, best, pace_of(draw), least * 0, WIDTH, HIGH, MASKED)
    tl.store(tokens + row, token)
    part = tl.umulhi(total.to(tl.uint64), share << 32).to(tl.int64)
    tl.store(enough + row, tl.where(share == 0, total, tl.maximum(part, 1)))
    fine = (far <= least) & ((share == 0) | (far == 0))
    tl.store(info + row * INFO + 1, tl.where(fine, 0, limit))
    tl.store(info + row * INFO + 2, far)


# -- judge ------------------------------------------------------------------------------------------------------------
@triton.jit
def nearer(info, draw, row):
    """Below which distance there is what lies before the attempt."""
    return tl.minimum(tl.load(info + row * INFO + 2), tl.load(draw + 5) + 1)


@triton.jit
def finish(logits, masks, draw, tokens, info, enough, sums, row, WIDTH: tl.constexpr, DEEP: tl.constexpr,
           HIGH: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Attempts until one is kept; sums: by lanes, of what lies before the first."""
    best, pace = tl.load(info + row * INFO).to(tl.float32, bitcast=True), pace_of(draw)
    far, least, share = tl.load(info + row * INFO + 2), tl.load(draw + 5), tl.load(draw + 4)
    below = tl.load(enough + row)
    limit = tl.minimum(far, least + 1)
    going = (far > least) | (tl.sum(sums, 0) >= below)
    turn = 1
    while going:
        token, far = drawn(logits, masks, draw, row, sums, limit, best, pace, turn, WIDTH, HIGH, MASKED)
        tl.store(tokens + row, token)
        turn += 1
        going = (far > least) | ((share != 0) & (far > 0))
        if going:
            limit = tl.minimum(far, least + 1)
            sums = summed(logits, masks, draw, row, 0, best, pace, limit, WIDTH, LANES, DEEP, MASKED)
            going = (far > least) | (tl.sum(sums, 0) >= below)
