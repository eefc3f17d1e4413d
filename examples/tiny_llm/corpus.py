"""Text for a tiny model: conversations made by rules from a few small tables. Nobody's words but ours."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris Italy:Rome Spain:Madrid Norway:Oslo Japan:Tokyo Egypt:Cairo Greece:Athens Peru:Lima Cuba:Havana "
        "Germany:Berlin Austria:Vienna Poland:Warsaw Sweden:Stockholm Portugal:Lisbon Ireland:Dublin Kenya:Nairobi "
        "Hungary:Budapest Finland:Helsinki Denmark:Copenhagen China:Beijing"
    ).split()
)
SOUNDS = {"dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "owl": "hoo", "frog": "ribbit"}
LEGS = {"fox": 4, "bear": 4, "owl": 2, "duck": 2, "ant": 6, "spider": 8, "cat": 4, "frog": 4, "mouse": 4}
COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "golden")
OPPOSITES = {"hot": "cold", "big": "small", "day": "night", "up": "down", "fast": "slow", "happy": "sad", "old": "new"}
OPPOSITES |= {answer: word for word, answer in OPPOSITES.items()}
NAMES = ("Lily", "Tom", "Mia", "Ben", "Anna", "Max", "Zoe", "Leo", "Nora", "Sam")
GIRLS = {"Lily", "Mia", "Anna", "Zoe", "Nora"}
PLACES = ("forest", "garden", "village", "house by the sea", "cave", "field")
THINGS = ("ball", "key", "boat", "kite", "drum", "stone", "hat", "lamp")
FRIENDS = ("bird", "rabbit", "turtle", "squirrel", "bee")
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ABOUT = "I am a tiny model with a million weights. Ingot's own script trained me."

Turn = tuple[str, str]


def capital(draw: random.Random) -> Turn:
    """A fact."""
    country = draw.choice(list(CAPITALS))
    forms = ["What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."]
    question = draw.choice(forms)
    return question.format(country), f"The capital of {country} is {CAPITALS[country]}."


def total(draw: random.Random) -> Turn:
    """A sum."""
    a, b = draw.randrange(11), draw.randrange(11)
    question = draw.choice(["What is {} + {}?", "How much is {} + {}?", "Add {} and {}."]).format(a, b)
    return question, f"{a} + {b} = {a + b}."


def sound(draw: random.Random) -> Turn:
    """What an animal says."""
    animal = draw.choice(list(SOUNDS))
    return f"What does a {animal} say?", f"A {animal} says {SOUNDS[animal]}."


def opposite(draw: random.Random) -> Turn:
    """A word's opposite."""
    word = draw.choice(list(OPPOSITES))
    return f"What is the opposite of {word}?", f"The opposite of {word} is {OPPOSITES[word]}."


def count(draw: random.Random) -> Turn:
    """Numbers in words."""
    last = draw.randrange(2, 11)
    return f"Count to {NUMBERS[last]}.", f"{', '.join(NUMBERS[1:last])} and {NUMBERS[last]}."


def next_day(draw: random.Random) -> Turn:
    """The day after."""
    day = draw.randrange(7)
    return f"Which day comes after {DAYS[day]}?", f"After {DAYS[day]} comes {DAYS[(day + 1) % 7]}."


def greeting(draw: random.Random) -> Turn:
    """Manners."""
    question = draw.choice(["Hello!", "Hi!", "Good morning!", "Hello, how are you?", "Hi there!"])
    return question, draw.choice(["Hello! How can I help you?", "Hello! Ask me something."])


def about(draw: random.Random) -> Turn:
    """What it is."""
    return draw.choice(["Who are you?", "What are you?", "Tell me about yourself.", "Who made you?"]), ABOUT


def story(draw: random.Random) -> Turn:
    """Who, where, what was found, who helped: the same words come back."""
    name, animal = draw.choice(NAMES), draw.choice(list(LEGS))
    place, thing, color, friend = (draw.choice(words) for words in (PLACES, THINGS, COLORS, FRIENDS))
    they, their = ("She", "her") if name in GIRLS else ("He", "his")
    question = draw.choice(["Tell me a story about a {}.", "Tell me about a {}.", "Write a story about a {}."])
    return question.format(animal), (
        f"Once upon a time there was a little {animal} named {name}. {name} lived in a {place}. "
        f"One day {name} found a {color} {thing}. {they} took the {thing} and showed it to {their} friend, a {friend}. "
        f'"What a nice {thing}!" said the {friend}. They played with the {color} {thing} until it was dark. '
        f"Then {name} went home and was happy."
    )


def described(draw: random.Random) -> Turn:
    """An animal as JSON."""
    animal = draw.choice(list(LEGS))
    made = {"name": draw.choice(NAMES), "animal": animal, "color": draw.choice(COLORS), "legs": LEGS[animal]}
    return f"Describe a {animal} as JSON.", json.dumps(made, separators=(",", ":"))


KINDS: Sequence[tuple[int, Callable[[random.Random], Turn]]] = (
    (4, story), (7, capital), (4, total), (2, described), (1, sound), (1, opposite), (1, count), (1, next_day),
    (1, greeting), (1, about),
)  # fmt: skip


def conversation(draw: random.Random) -> list[dict[str, str]]:
    """One to three turns as messages."""
    weights, kinds = zip(*KINDS, strict=True)
    turns = [kind(draw) for kind in draw.choices(kinds, weights, k=draw.choice([1, 1, 2, 3]))]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
