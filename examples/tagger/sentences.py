"""Order messages with a tag for every word: the tagger's generated data set.

The task is honest: a third of the held-out names, things and places are never seen in training (they read as UNKNOWN,
so only the context tells), and words such as "may", "rose" or "paris" change their tag with their place.
"""

import random
from collections.abc import Iterable

import numpy as np

TAGS = ("other", "person", "thing", "place", "count", "date")
PADDING, UNKNOWN = 0, 1

WORDS: dict[str, tuple[str, ...]] = {
    "person": tuple(
        "anna boris carla deepa erik fatima georg hana ivan may rose paris jun kofi lena mark nadia omar pia quentin "
        "ravi sara tomas ursula victor wanda xenia yusuf zoe april summer austin".split()
    ),
    "thing": tuple(
        "nails roses paper lamps chairs copper cables pumps filters valves rose march tape glue paint bolts screws "
        "bricks tiles pipes hinges panels brushes ladders buckets ropes hammers".split()
    ),
    "place": tuple(
        "oslo lima cairo paris austin delhi kyoto quito turin ghent basel lagos perth malmo tunis seoul dakar porto "
        "bergen leeds riga bonn split nice reading mobile".split()
    ),
    "month": tuple("january february march april may june july august september october november december".split()),
    "day": tuple("monday tuesday wednesday thursday friday saturday sunday".split()),
    "container": tuple("boxes crates rolls bags pallets".split()),
}
SEEN_SHARE = 2 / 3
COUNTED = ("two", "three", "seven", "twelve", "forty") + tuple(str(number) for number in range(2, 32))

# A slot in capitals is drawn; the other words are taken as they are.
TEMPLATES = tuple(
    template.split()
    for template in (
        "please send COUNT CONTAINER of THING to PERSON in PLACE by DATE",
        "PERSON may want COUNT THING before DATE",
        "did PERSON march to PLACE with the THING on DATE",
        "we are out of THING , PERSON will bring COUNT from PLACE",
        "the price of THING rose on DATE in PLACE",
        "ship COUNT THING and COUNT THING from PLACE to PLACE",
        "on DATE PERSON and PERSON may split the COUNT CONTAINER",
        "PERSON is reading in PLACE until DATE",
        "it is nice of PERSON to send THING",
        "can PERSON be reached by mobile in PLACE on DATE ?",
        "cancel the THING for PERSON , keep COUNT CONTAINER for PERSON",
        "PLACE needs COUNT more THING than PLACE since DATE",
    )
)
FIXED = sorted({word for template in TEMPLATES for word in template if not word.isupper()})

Tagged = list[tuple[str, str]]


def seen(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words that training sentences draw from; the rest appears in held-out sentences only."""
    return words[: round(len(words) * SEEN_SHARE)]


def vocabulary() -> dict[str, int]:
    """Every word of the training sentences and its id."""
    known = [word for kind in ("person", "thing", "place") for word in seen(WORDS[kind])]
    closed = [word for kind in ("month", "day", "container") for word in WORDS[kind]]
    return {word: index for index, word in enumerate(dict.fromkeys([*FIXED, *COUNTED, *closed, *known]), UNKNOWN + 1)}


def date(source: random.Random) -> Tagged:
    day, month = source.choice(WORDS["day"]), source.choice(WORDS["month"])
    number = str(source.randrange(2, 32))
    forms = ([day], [number, month], [month, number], [day, number, month], [month])
    return [(word, "date") for word in source.choice(forms)]


def fill(slot: str, source: random.Random, heldout: bool) -> Tagged:
    """The tagged words that stand for one word of a template."""
    kind = slot.lower()
    if slot == "DATE":
        return date(source)
    if slot == "COUNT":
        return [(source.choice(COUNTED), "count")]
    if not slot.isupper() or slot == "CONTAINER":
        return [(source.choice(WORDS["container"]) if slot.isupper() else slot, "other")]
    return [(source.choice(WORDS[kind] if heldout else seen(WORDS[kind])), kind)]


def sentence(source: random.Random, heldout: bool) -> Tagged:
    template = source.choice(TEMPLATES)
    return [pair for slot in template for pair in fill(slot, source, heldout)]


def sentences(count: int, seed: int, heldout: bool) -> list[Tagged]:
    source = random.Random(seed)
    return [sentence(source, heldout) for _ in range(count)]


def encode(words: Iterable[str], table: dict[str, int]) -> list[int]:
    return [table.get(word, UNKNOWN) for word in words]


def batch(tagged: list[Tagged]) -> tuple[np.ndarray, np.ndarray]:
    """Word ids and tag indices [N, S], padded with PADDING and -100 (not counted)."""
    table, longest = vocabulary(), max(map(len, tagged))
    ids_NS = np.full((len(tagged), longest), PADDING, np.int64)
    tags_NS = np.full((len(tagged), longest), -100, np.int64)
    for row, pairs in enumerate(tagged):
        ids_NS[row, : len(pairs)] = encode((word for word, _ in pairs), table)
        tags_NS[row, : len(pairs)] = [TAGS.index(tag) for _, tag in pairs]
    return ids_NS, tags_NS
