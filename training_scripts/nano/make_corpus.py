"""Writes the nano corpus: the conversations of a small assistant, as text.

    python training_scripts/nano/make_corpus.py WORK            (all of it: seconds)
    python training_scripts/nano/make_corpus.py WORK --quick    (a small part)

A small closed world: small talk, arithmetic to twenty, colours, days, months and hours, animals, simple facts, and
things that the question itself tells ("The ball is under the table. Where is the ball?"); questions about scenes that
a later stage draws; and, as a kind of its own, sentences to repeat.

WORK/corpus/conversations.jsonl has one conversation a line:

    id          number, in the order of the file
    kind        topic
    split       "train" or "eval"
    held        what is new in an eval conversation: "answer" (a sentence that is in no training conversation),
                "scene" (a scene that none shows), "paraphrase" (a way of asking that none uses), or "question" (the
                wording and the thing asked for are known, but not together); null in training
    question    text; numbers are words
    answer      text, 1 to 12 words
    scene       for questions about a picture: a list of {shape, colour, where}; `where` is one of `POSITIONS` or, of
                several equal shapes, null; null for the others

The same seed gives the same file. No question of the eval split is in the training split (with the same scene), every
word of its answers is.
"""

import hashlib
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import corpus_words as words
from stages import digest_of_files, new_plot, run_stage, save_plot, stage_arguments, write_lines

HELD_OUT = 0.05  # of the composed answers, the scenes, and the questions that have other wordings
EVAL_OF_A_KIND = {"answer": 60, "scene": 120, "paraphrase": 40, "question": 40}  # conversations at most

NUMBERS = words.NUMBERS


@dataclass(frozen=True)
class Item:
    """An answer and the ways to ask for it. Wordings that begin with "~" are held out.

    Args:
        kind (`str`): Topic.
        answer (`str`): What is said.
        wordings (tuple of `str`): Questions.
        composed (`bool`): The answer is made of parts that other answers have too, or told by the question: somebody
            who has not seen it can find it.
        scene (`str`, *optional*): As JSON.
        more (tuple of `str`): Wordings for training alone: they are not among those that may be held out.
    """

    kind: str
    answer: str
    wordings: tuple[str, ...]
    composed: bool = False
    scene: str | None = None
    more: tuple[str, ...] = ()


def sentence(text: str) -> str:
    """With a capital at its beginning."""
    return text[0].upper() + text[1:]


def fill(wordings: Sequence[str], **fields: str) -> tuple[str, ...]:
    """Fills templates, and begins them with a capital; the "~" of a held-out one stays in front."""
    filled = (wording.lstrip("~").format(**fields) for wording in wordings)
    return tuple(
        ("~" if wording[0] == "~" else "") + sentence(text) for wording, text in zip(wordings, filled, strict=True)
    )


def more_ways(sort: str, **fields: str) -> tuple[str, ...]:
    """The wordings of a sort that are for training alone."""
    return fill(words.MORE_WAYS[sort], **fields)


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def small_talk() -> Iterator[Item]:
    for answer, wordings in words.SMALL_TALK.items():
        yield Item("small talk", answer, wordings)
    for name in words.NAMES:
        ways = ("My name is {x}.", "I am {x}.", "Hello, my name is {x}.", "Hi, I am {x}.", "~Hello, I am {x}.")
        yield Item("small talk", f"Nice to meet you, {name}.", fill(ways, x=name), composed=True)
        ways = ("Say hello to {x}.", "Please greet {x}.", "Greet my friend {x}.", "~Please say hello to {x}.")
        yield Item("small talk", f"Hello {name}, how are you?", fill(ways, x=name), composed=True)
        ways = ("{x} says goodbye.", "Say goodbye to {x}.", "{x} is leaving.", "~{x} has to go.")
        yield Item("small talk", f"Goodbye {name}, see you soon.", fill(ways, x=name), composed=True)


def arithmetic() -> Iterator[Item]:
    plus = (
        *("What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?"),
        *("Tell me {a} plus {b}.", "What do {a} and {b} make?", "~Please add {a} and {b}."),
    )
    minus = (
        *("What is {a} minus {b}?", "How much is {a} minus {b}?", "Take {b} from {a}.", "Tell me {a} minus {b}."),
        *("What is left when you take {b} from {a}?", "~Please take {b} from {a}."),
    )
    times = (
        "What is {a} times {b}?",
        "How much is {a} times {b}?",
        "Tell me {a} times {b}.",
        "~{a} times {b} is what?",
    )
    for a, b in itertools.product(range(21), repeat=2):
        fields = {"a": NUMBERS[a], "b": NUMBERS[b]}
        if a + b <= 20:
            answer = f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}."
            more = more_ways("plus", **fields)
            yield Item("arithmetic", sentence(answer), fill(plus, **fields), composed=True, more=more)
        if a >= b:
            answer = f"{NUMBERS[a]} minus {NUMBERS[b]} is {NUMBERS[a - b]}."
            more = more_ways("minus", **fields)
            yield Item("arithmetic", sentence(answer), fill(minus, **fields), composed=True, more=more)
        if 2 <= a <= 10 and 2 <= b <= 10 and a * b <= 20:
            answer = f"{NUMBERS[a]} times {NUMBERS[b]} is {NUMBERS[a * b]}."
            yield Item("arithmetic", sentence(answer), fill(times, **fields), more=more_ways("times", **fields))


def counting() -> Iterator[Item]:
    larger = (
        *("Which is larger, {a} or {b}?", "Which number is larger, {a} or {b}?", "Is {a} larger than {b}?"),
        *("Is {b} larger than {a}?", "~Which one is larger, {a} or {b}?"),
    )
    for low, high in itertools.combinations(range(21), 2):
        fields = {"a": NUMBERS[low], "b": NUMBERS[high]}
        more = more_ways("larger", **fields)
        answer = sentence(f"{NUMBERS[high]} is larger than {NUMBERS[low]}.")
        yield Item("counting", answer, fill(larger, **fields), composed=True, more=more)
    for n in range(20):
        ways = ("What comes after {x}?", "Which number comes after {x}?", "What is the next number after {x}?")
        ways = fill((*ways, "~Tell me the number after {x}."), x=NUMBERS[n])
        more = more_ways("next", x=NUMBERS[n])
        yield Item("counting", sentence(f"{NUMBERS[n + 1]} comes after {NUMBERS[n]}."), ways, more=more)
        ways = ("What comes before {x}?", "Which number comes before {x}?", "What is the number before {x}?")
        ways = fill((*ways, "~Tell me the number before {x}."), x=NUMBERS[n + 1])
        more = more_ways("previous", x=NUMBERS[n + 1])
        yield Item("counting", sentence(f"{NUMBERS[n]} comes before {NUMBERS[n + 1]}."), ways, more=more)
    for first, length in itertools.product(range(1, 18), (3, 4, 5)):
        last = first + length - 1
        if last <= 20:
            ends = {"a": NUMBERS[first], "b": NUMBERS[last]}
            row = [NUMBERS[n] for n in range(first, last + 1)]
            ways = ("Count from {a} to {b}.", "Please count from {a} to {b}.", "Can you count from {a} to {b}?")
            more = more_ways("count", **ends)
            yield Item("counting", sentence(", ".join(row) + "."), fill(ways, **ends), composed=True, more=more)
            ways = ("Count from {b} down to {a}.", "Please count from {b} down to {a}.", "Count down from {b} to {a}.")
            more = more_ways("count down", **ends)
            yield Item("counting", sentence(", ".join(row[::-1]) + "."), fill(ways, **ends), True, more=more)
    for n in range(2, 21):
        kind = ("even", "odd")[n % 2]
        ways = (
            "Is {x} even or odd?",
            "Is the number {x} even or odd?",
            "Is {x} an even number?",
            "Is {x} an odd number?",
        )
        yield Item("counting", sentence(f"{NUMBERS[n]} is an {kind} number."), fill(ways, x=NUMBERS[n]))
    ways = (
        *(
            "I have {a} {x} and get {b} more. How many do I have?",
            "I have {a} {x} and find {b} more. How many are there?",
        ),
        "~I have {a} {x} and get {b} more. How many are there?",
    )
    less = (
        *("I have {a} {x} and lose {b}. How many are left?", "I have {a} {x} and give away {b}. How many are left?"),
        "~I had {a} {x} and lost {b}. How many are left?",
    )
    for (one, many), a, b in itertools.product(words.COUNTED, range(2, 19), range(1, 10)):
        fields = {"a": NUMBERS[a], "b": NUMBERS[b], "x": many}
        if a + b <= 20:
            answer, more = f"Then you have {NUMBERS[a + b]} {many}.", more_ways("get", **fields)
            yield Item("problems", answer, fill(ways, **fields), composed=True, more=more)
        if a > b:
            rest = f"{NUMBERS[a - b]} {one if a - b == 1 else many}"
            more = more_ways("lose", **fields)
            yield Item("problems", f"You have {rest} left.", fill(less, **fields), composed=True, more=more)


def colours() -> Iterator[Item]:
    asked = (
        *(
            "What colour is {x}?",
            "Which color does {x} have?",
            "Tell me the colour of {x}.",
            "What is the color of {x}?",
        ),
        *(
            "What color is {x}?",
            "Do you know the colour of {x}?",
            "~Please tell me the colour of {x}.",
            "~Which colour is {x}?",
        ),
    )
    every = sorted(words.COLOURS)
    for colour, things in words.COLOURS.items():
        for thing in things:
            yield Item("colours", f"The color of {thing} is {colour}.", fill(asked, x=thing))
            yield Item("colours", f"Yes, the color of {thing} is {colour}.", (f"Is {thing} {colour}?",))
            others = tuple(f"Is {thing} {other}?" for other in every if other != colour)
            yield Item("colours", f"No, the color of {thing} is {colour}.", others)
    mixed = (
        *("What do {a} and {b} make?", "Mix {a} and {b}.", "Which colour do you get from {a} and {b}?"),
        *("What happens when I mix {a} with {b}?", "What do {b} and {a} make?"),
    )
    for (a, b), colour in words.MIXED_COLOURS.items():
        yield Item("colours", sentence(f"{a} and {b} make {colour}."), fill(mixed, a=a, b=b))


def calendar() -> Iterator[Item]:
    days, months = words.DAYS, list(words.MONTHS)
    for index, day in enumerate(days):
        after, before = days[(index + 1) % 7], days[index - 1]
        ways = (
            "What day comes after {x}?",
            "Which day comes after {x}?",
            "Which day follows {x}?",
            "~What day follows {x}?",
        )
        more = more_ways("day after", x=day)
        yield Item("calendar", f"{after} comes after {day}.", fill(ways, x=day), more=more)
        ways = ("What day comes before {x}?", "Which day comes before {x}?", "~Tell me the day before {x}.")
        more = more_ways("day before", x=day)
        yield Item("calendar", f"{before} comes before {day}.", fill(ways, x=day), more=more)
        ways = (
            "Today is {x}. What day is tomorrow?",
            "If today is {x}, what is tomorrow?",
            "It is {x}. What is tomorrow?",
        )
        more = more_ways("tomorrow", x=day)
        yield Item("calendar", f"Tomorrow is {after}.", fill(ways, x=day), more=more)
        ways = ("Today is {x}. What day was yesterday?", "If today is {x}, what was yesterday?")
        more = more_ways("yesterday", x=day)
        yield Item("calendar", f"Yesterday was {before}.", fill(ways, x=day), more=more)
        ways = ("Is {x} a weekend day?", "Is {x} on the weekend?", "Do people work on {x}?", "Is {x} a working day?")
        answer = f"{day} is on the weekend." if index > 4 else f"{day} is a working day."
        yield Item("calendar", answer, fill(ways, x=day))
        ways = ("What is the {x} day of the week?", "Which is the {x} day?", "~Name the {x} day of the week.")
        nth = words.ORDINALS[index]
        yield Item("calendar", f"The {nth} day is {day}.", fill(ways, x=nth), more=more_ways("day", x=nth))
    for index, (month, (season, length)) in enumerate(words.MONTHS.items()):
        after, before = months[(index + 1) % 12], months[index - 1]
        ways = ("What month comes after {x}?", "Which month comes after {x}?", "Which month follows {x}?")
        more = more_ways("month after", x=month)
        yield Item("calendar", f"{after} comes after {month}.", fill(ways, x=month), more=more)
        ways = ("What month comes before {x}?", "Which month comes before {x}?", "~Tell me the month before {x}.")
        more = more_ways("month before", x=month)
        yield Item("calendar", f"{before} comes before {month}.", fill(ways, x=month), more=more)
        ways = (
            "How many days are in {x}?",
            "How many days has {x}?",
            "How long is {x}?",
            "~How many days does {x} have?",
        )
        more = more_ways("days", x=month)
        yield Item("calendar", f"{month} has {length} days.", fill(ways, x=month), more=more)
        ways = (
            "Which season is {x} in?",
            "In which season is {x}?",
            "What season is it in {x}?",
            "~Tell me the season of {x}.",
        )
        more = more_ways("season", x=month)
        yield Item("calendar", f"{month} is in the {season}.", fill(ways, x=month), more=more)
        ways = ("What is the {x} month of the year?", "Which is the {x} month?", "~Name the {x} month of the year.")
        nth = words.ORDINALS[index]
        yield Item("calendar", f"The {nth} month is {month}.", fill(ways, x=nth), more=more_ways("month", x=nth))
    for index, season in enumerate(words.SEASONS):
        ways = ("What season comes after {x}?", "Which season comes after {x}?", "Which season follows {x}?")
        answer = f"After {season} comes {words.SEASONS[(index + 1) % 4]}."
        yield Item("calendar", answer, fill(ways, x=season), more=more_ways("season after", x=season))
    for hour, later in itertools.product(range(1, 13), range(1, 7)):
        then = NUMBERS[(hour + later - 1) % 12 + 1]
        fields = {"a": NUMBERS[hour], "b": f"{NUMBERS[later]} hour{'s' if later > 1 else ''}"}
        ways = ("It is {a} o'clock. What time is it in {b}?", "If it is {a} o'clock now, what time is it in {b}?")
        more = more_ways("later", **fields)
        yield Item("clock", f"In {fields['b']} it is {then} o'clock.", fill(ways, **fields), True, more=more)
        ways = ("It is {a} o'clock. What time was it {b} ago?", "If it is {a} o'clock now, what time was it {b} ago?")
        then = NUMBERS[(hour - later - 1) % 12 + 1]
        more = more_ways("ago", **fields)
        yield Item("clock", f"It was {then} o'clock {fields['b']} ago.", fill(ways, **fields), True, more=more)


def animals() -> Iterator[Item]:
    table = words.ANIMALS
    for a, b in itertools.permutations(table, 2):
        if table[a][0] > table[b][0]:
            fields = {"a": article(a), "b": article(b)}
            ways = ("Which is bigger, {a} or {b}?", "Is {a} bigger than {b}?", "Is {b} bigger than {a}?")
            ways = fill((*ways, "~Which animal is bigger, {a} or {b}?"), **fields)
            yield Item("bigger", f"The {a} is bigger than the {b}.", ways, composed=True)
            ways = ("Which is smaller, {a} or {b}?", "Is {b} smaller than {a}?", "Is {a} smaller than {b}?")
            ways = fill((*ways, "~Which animal is smaller, {a} or {b}?"), **fields)
            yield Item("bigger", f"The {b} is smaller than the {a}.", ways, composed=True)
    for animal, (_, legs, flies, swims, home, food) in table.items():
        one = article(animal)
        ways = ("How many legs has {x}?", "How many legs does {x} have?", "Tell me how many legs {x} has.")
        answer = f"The {animal} has {NUMBERS[legs] if legs else 'no'} legs."
        yield Item("animals", answer, fill((*ways, "~Do you know how many legs {x} has?"), x=one))
        ways = (
            "Where does {x} live?",
            "Where do you find {x}?",
            "Tell me where {x} lives.",
            "~Do you know where {x} lives?",
        )
        yield Item("animals", f"The {animal} lives {home}.", fill(ways, x=one))
        ways = (
            "What does {x} eat?",
            "What does {x} like to eat?",
            "Tell me what {x} eats.",
            "~Do you know what {x} eats?",
        )
        yield Item("animals", f"The {animal} likes to eat {food}.", fill(ways, x=one))
        if animal not in ("chicken", "ant"):  # which can, a little
            answer = f"Yes, the {animal} can fly." if flies else f"No, the {animal} can not fly."
            ways = ("Can {x} fly?", "Does {x} fly?", "Tell me if {x} can fly.", "~Do you know if {x} can fly?")
            yield Item("animals", answer, fill(ways, x=one))
        if swims:
            yield Item("animals", f"Yes, the {animal} can swim.", fill(("Can {x} swim?", "Does {x} swim?"), x=one))
    for animal, sound in words.SOUNDS.items():
        ways = (
            "What does {x} say?",
            "Which sound does {x} make?",
            "How does {x} sound?",
            "~What sound does {x} make?",
        )
        yield Item("animals", f"The {animal} says {sound}.", fill(ways, x=article(animal)))
        ways = ("Who says {x}?", "Which animal says {x}?", "~Tell me who says {x}.")
        yield Item("animals", f"The {animal} says {sound}.", fill(ways, x=sound))
    for animal, young in words.YOUNG.items():
        ways = ("What is a young {x} called?", "What do you call a baby {x}?", "~What is a baby {x} called?")
        yield Item("animals", f"We call a young {animal} a {young}.", fill(ways, x=animal))


def facts() -> Iterator[Item]:
    for answer, wordings in words.FACTS.items():
        yield Item("facts", answer, wordings)
    opposites: dict[str, str] = {}
    for a, b in words.OPPOSITES:
        opposites.setdefault(a, b)
        opposites.setdefault(b, a)
    for a, b in opposites.items():
        ways = ("What is the opposite of {x}?", "Tell me the opposite of {x}.", "Which word is the opposite of {x}?")
        ways = fill((*ways, "~Do you know the opposite of {x}?", "~Please tell me the opposite of {x}."), x=a)
        yield Item("facts", f"The opposite of {a} is {b}.", ways)
    for category, members in words.CATEGORIES.items():
        for thing in members:
            ways = fill(
                ("What is {x}?", "What kind of thing is {x}?", "Tell me what {x} is.", "~Do you know what {x} is?"),
                x=thing,
            )
            yield Item("facts", sentence(f"{thing} is {category}."), ways)
            yield Item("facts", sentence(f"yes, {thing} is {category}."), (f"Is {thing} {category}?",))
            others = tuple(f"Is {thing} {other}?" for other in words.CATEGORIES if other != category)
            yield Item("facts", sentence(f"no, {thing} is {category}."), others)
    for thing, use in words.USES.items():
        ways = (
            "What do you do with {x}?",
            "What is {x} for?",
            "What can I do with {x}?",
            "~What do people do with {x}?",
        )
        yield Item("facts", f"You {use} with {thing}.", fill(ways, x=thing))
        ways = ("What do I need to {x}?", "With what do you {x}?", "~What do people need to {x}?")
        yield Item("facts", f"You {use} with {thing}.", fill(ways, x=use))
    for person, work in words.JOBS.items():
        ways = (
            "What does {x} do?",
            "What is the job of {x}?",
            "Tell me what {x} does.",
            "~Do you know what {x} does?",
        )
        yield Item("facts", sentence(f"{article(person)} {work}."), fill(ways, x=article(person)))
        yield Item("facts", sentence(f"{article(person)} {work}."), (f"Who {work}?", f"Which person {work}?"))
    for thing, material in words.MATERIALS.items():
        ways = ("What is {x} made of?", "Tell me what {x} is made of.", "~Do you know what {x} is made of?")
        yield Item("facts", sentence(f"{thing} is made of {material}."), fill(ways, x=thing))
    for action, place in words.PLACES_TO.items():
        ways = ("Where do you {x}?", "Where can I {x}?", "Tell me where to {x}.", "~Where do people {x}?")
        yield Item("facts", f"You can {action} {place}.", fill(ways, x=action))
    for country, city in words.CAPITALS.items():
        ways = ("What is the capital of {x}?", "Tell me the capital of {x}.", "~Do you know the capital of {x}?")
        yield Item("facts", f"The capital of {country} is {city}.", fill(ways, x=country))
        ways = ("Where is {x}?", "In which country is {x}?", "~Which country is {x} in?")
        yield Item("facts", f"{city} is in {country}.", fill(ways, x=city))
    for shape, sides in words.SHAPE_SIDES.items():
        ways = ("How many sides has a {x}?", "How many sides does a {x} have?", "~Tell me how many sides a {x} has.")
        yield Item("facts", f"A {shape} has {NUMBERS[sides]} sides.", fill(ways, x=shape))


def told(generator: random.Random, size: int) -> Iterator[Item]:
    """The question itself tells what is asked for: `size` answers of each sort."""
    sorts = (
        itertools.product(words.OBJECTS, words.PREPOSITIONS, words.FURNITURE),
        itertools.product(words.NAMES, words.TINTS, words.OBJECTS),
        itertools.product(words.NAMES, words.DESTINATIONS, words.DAYS),
        itertools.product(words.NAMES, words.FOODS),
        itertools.permutations(words.FOODS, 2),
        itertools.product(words.ERRANDS, NUMBERS[1:13]),
    )
    where, has, goes, likes, shopping, errands = (sample(generator, list(sort), size) for sort in sorts)
    for thing, place, near in where:
        ways = (
            *("The {x} is {p} the {y}. Where is the {x}?", "I put the {x} {p} the {y}. Where is it?"),
            *("I left the {x} {p} the {y}. Where is the {x}?", "Where is the {x}? I put it {p} the {y}."),
            "~My {x} is {p} the {y}. Where is my {x}?",
        )
        ways = fill(ways, x=thing, p=place, y=near)
        yield Item("where", f"The {thing} is {place} the {near}.", ways, composed=True)
    for name, tint, thing in has:
        ways = (
            *("{n} has a {c} {x}. What does {n} have?", "{n} has a {c} {x}. Who has a {x}?"),
            *("{n} found a {c} {x}. What does {n} have?", "I gave {n} a {c} {x}. What does {n} have?"),
            "~{n} has a {c} {x}. Tell me what {n} has.",
        )
        fields = {"n": name, "c": tint, "x": thing}
        ways, more = fill(ways, **fields), more_ways("has", **fields)
        yield Item("has", f"You said that {name} has a {tint} {thing}.", ways, composed=True, more=more)
    for name, place, day in goes:
        fields = {"n": name, "p": place, "d": day}
        ways = (
            *("{n} goes to the {p} on {d}. When does {n} go there?", "On {d} {n} goes to the {p}. Where does {n} go?"),
            *(
                "{n} goes to the {p} on {d}. Who goes to the {p}?",
                "On {d} {n} goes to the {p}. What does {n} do on {d}?",
            ),
            "~On {d} {n} goes to the {p}. When does {n} go there?",
        )
        ways = fill(ways, **fields)
        yield Item("goes", f"{name} goes to the {place} on {day}.", ways, composed=True)
    for name, food in likes:
        for other, another in zip(sample(generator, words.NAMES, 3), sample(generator, words.FOODS, 3), strict=True):
            if other != name and food != another:
                fields = {"a": name, "x": food, "b": other, "y": another}
                ways = (
                    "{a} likes {x} and {b} likes {y}. What does {a} like?",
                    "{b} likes {y} and {a} likes {x}. Who likes {x}?",
                )
                yield Item("likes", f"You said that {name} likes {food}.", fill(ways, **fields), composed=True)
    for first, second in shopping:
        ways = (
            "Put {a} and {b} on my list.",
            "Please put {a} and {b} on the list.",
            "I need {a} and {b}.",
            "~Write {a} and {b} on my list.",
        )
        yield Item("list", f"I wrote down {first} and {second}.", fill(ways, a=first, b=second), composed=True)
    for errand, hour in errands:
        ways = (
            "Remind me to {x} at {h}.",
            "Please remind me to {x} at {h}.",
            "I have to {x} at {h}.",
            "~Tell me to {x} at {h}.",
        )
        yield Item("remind", f"I will remind you to {errand} at {hour}.", fill(ways, x=errand, h=hour), composed=True)


def shown(shape: str, colour: str, where: str | None = None) -> dict:
    return {"shape": shape, "colour": colour, "where": where}


def pictures(generator: random.Random, size: int) -> Iterator[Item]:
    """Questions about scenes: one shape somewhere, several equal ones, and two different ones (`size` of these)."""

    def item(scene: list[dict], answer: str, *wordings: str) -> Item:
        return Item("picture", sentence(answer), tuple(map(sentence, wordings)), False, json.dumps(scene))

    for shape, colour, (where, place) in itertools.product(words.SHAPES, words.SHAPE_COLOURS, words.POSITIONS.items()):
        scene = [shown(shape, colour, where)]
        what = f"{article(colour)} {shape}"
        yield item(scene, f"there is {what}.", "What is in the picture?", "What do you see?", "What is this?")
        yield item(
            scene, f"the {shape} is {colour}.", f"what colour is the {shape}?", f"which colour does the {shape} have?"
        )
        yield item(
            scene, f"the {colour} {shape} is {place}.", f"where is the {shape}?", f"where is the {colour} {shape}?"
        )
        yield item(scene, f"it is a {shape}.", "What shape is it?", "Which shape do you see?")
        other = generator.choice([other for other in words.SHAPES if other != shape])
        yield item(scene, f"no, there is no {other}.", f"is there {article(other)}?", f"do you see {article(other)}?")
        yield item(scene, f"yes, there is {what}.", f"is there {article(shape)}?", f"do you see {article(shape)}?")
    for shape, colour, count in itertools.product(words.SHAPES, words.SHAPE_COLOURS, range(2, 6)):
        scene = [shown(shape, colour)] * count
        what = f"{NUMBERS[count]} {colour} {shape}s"
        yield item(scene, f"there are {what}.", f"how many {shape}s are there?", f"how many {shape}s do you see?")
        yield item(scene, f"there are {what}.", "What is in the picture?", "What do you see?")
        yield item(
            scene,
            f"the {shape}s are {colour}.",
            f"what colour are the {shape}s?",
            f"which colour do the {shape}s have?",
        )
    pairs = [
        ((a, c), (b, d), sides)
        for (a, b), c, d in itertools.product(
            itertools.permutations(words.SHAPES, 2), words.SHAPE_COLOURS, words.SHAPE_COLOURS
        )
        if c != d
        for sides in (("left", "right"), ("top", "bottom"))
    ]
    for (a, c), (b, d), (first, second) in sample(generator, pairs, size):
        scene = [shown(a, c, first), shown(b, d, second)]
        for (shape, colour), (other, _), where in (((a, c), (b, d), first), ((b, d), (a, c), second)):
            place = words.POSITIONS[where]
            what = f"{article(colour)} {shape}"
            yield item(scene, f"{what} is {place}.", f"what is {place}?", f"what do you see {place}?")
            yield item(scene, f"the {shape} is {colour}.", f"what colour is the {shape}?")
            yield item(scene, f"the {colour} {shape} is {place}.", f"where is the {shape}?")
            relation = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}[where]
            yield item(scene, f"the {shape} is {relation} the {other}.", f"where is the {shape} from the {other}?")


class Deck:
    """Deals words in a shuffled order, all of them before any of them again."""

    def __init__(self, cards: str, generator: random.Random):
        self.cards, self.generator = cards.split(), generator
        self.left: list[str] = []

    def deal(self) -> str:
        if not self.left:
            self.left = self.generator.sample(self.cards, len(self.cards))
        return self.left.pop()


REPEAT_PATTERNS = (
    "The {adjective} {person} {did} the {thing}.",
    "The {person} {did_someone} the {adjective} {person}.",
    "We saw {a_adjective} {animal} near the {place}.",
    "My {person} {did} the {adjective} {thing}.",
    "The {thing} in the {place} is {adjective}.",
    "The {animal} {went} {adverb} near the {place}.",
    "She {adverb} {did} the {thing}.",
    "The {person} {went} to the {adjective} {place}.",
    "He {did_someone} the {person} at the {place}.",
    "They {did} {a_adjective} {thing} and a {thing}.",
)
# Verbs that go with "to": "walked to the old castle".
REPEAT_WENT_TO = "drove flew hurried marched moved ran returned rode rushed swam walked"


def repeated(generator: random.Random, size: int) -> Iterator[Item]:
    decks = {
        "adjective": words.REPEAT_ADJECTIVES,
        "person": words.REPEAT_PEOPLE,
        "animal": words.REPEAT_ANIMALS,
        "thing": words.REPEAT_THINGS,
        "place": words.REPEAT_PLACES,
        "did": words.REPEAT_DID_THING,
        "did_someone": words.REPEAT_DID_SOMEONE,
        "adverb": words.REPEAT_ADVERBS,
        "went": words.REPEAT_WENT,
        "went_to": REPEAT_WENT_TO,
    }
    dealt = {name: Deck(cards, generator) for name, cards in decks.items()}

    def field(match: re.Match) -> str:
        name = match[1]
        return article(dealt["adjective"].deal()) if name == "a_adjective" else dealt[name].deal()

    for number in range(size):
        pattern = REPEAT_PATTERNS[number % len(REPEAT_PATTERNS)].replace("{went} to", "{went_to} to")
        answer = re.sub(r"\{(\w+)\}", field, pattern)
        ways = ("Repeat after me: {x}", "Please repeat: {x}", "Say this after me: {x}")
        yield Item("repeat", answer, (generator.choice(ways).format(x=answer),), composed=True)


def sample(generator: random.Random, population: Sequence, size: int) -> list:
    return generator.sample(population, min(size, len(population)))


def draw(seed: int, text: str) -> float:
    """From 0 to 1: the same for the same text, whatever else is in the corpus."""
    return int(hashlib.sha256(f"{seed}/{text}".encode()).hexdigest()[:8], 16) / 2**32


def all_items(seed: int, size: int) -> list[Item]:
    """Every item of the closed domain, and sentences to repeat; `size` is how many of each sort that has no end."""
    generator = random.Random(seed)
    items = [*small_talk(), *arithmetic(), *counting(), *colours(), *calendar(), *animals(), *facts()]
    kept = limit_answers(items, {"problems": size // 2, "bigger": size, "clock": size}, seed)
    return [*kept, *told(generator, size), *pictures(generator, size // 2), *repeated(generator, size * 5)]


def limit_answers(items: Sequence[Item], limits: dict[str, int], seed: int) -> list[Item]:
    """Some kinds have more answers than are worth speaking: so many of them stay."""
    answers = {kind: sorted({item.answer for item in items if item.kind == kind}) for kind in limits}
    kept = {kind: set(sample(random.Random(seed), answers[kind], limits[kind])) for kind in limits}
    return [item for item in items if item.kind not in kept or item.answer in kept[item.kind]]


def held_out(item: Item, wording: str, seed: int) -> str | None:
    """What is new in this conversation, so that it is not trained on; None for most."""
    if item.scene and draw(seed, item.scene) < HELD_OUT:
        return "scene"
    if item.composed and draw(seed, item.answer) < HELD_OUT:
        return "answer"
    if wording[0] == "~":
        return "paraphrase"
    known = sum(other[0] != "~" for other in item.wordings)
    if known >= 3 and not item.scene and draw(seed, wording) < HELD_OUT:
        return "question"
    return None


def make_conversations(seed: int, size: int) -> list[dict]:
    """
    The corpus, training before evaluation.

    Args:
        seed (`int`): Of every choice.
        size (`int`): How many answers of each sort that has no end, such as what lies where.

    Returns:
        list of `dict`: With the fields that the head of this file names.
    """
    rows: dict[tuple, dict] = {}
    items = all_items(seed, size)
    for item in items:
        for wording in item.wordings:
            held = held_out(item, wording, seed)
            question = wording.lstrip("~")
            scene = None if item.scene is None else json.loads(item.scene)
            row = {"kind": item.kind, "held": held, "question": question, "answer": item.answer, "scene": scene}
            rows.setdefault((question, item.scene), row)
    train = [row for row in rows.values() if row["held"] is None]
    evaluation = choose_evaluation([row for row in rows.values() if row["held"]], train, seed)
    random.Random(seed).shuffle(train)
    return [
        {"id": number, "kind": row["kind"], "split": "eval" if row["held"] else "train", **row}
        for number, row in enumerate(train + evaluation + more_wordings(items, rows, seed))
    ]


def more_wordings(items: Sequence[Item], known: Mapping[tuple, dict], seed: int) -> list[dict]:
    """Training conversations in the wordings that are for training alone; `known` has all others, by question."""
    rows: dict[str, dict] = {}
    ways = [(item, question) for item in items for question in item.more]
    for item, question in ways:
        if (question, None) not in known and held_out(item, question, seed) != "answer":
            row = {"kind": item.kind, "held": None, "question": question, "answer": item.answer, "scene": None}
            rows.setdefault(question, row)
    return list(rows.values())


def choose_evaluation(held: Sequence[dict], train: Sequence[dict], seed: int) -> list[dict]:
    """Some held-out conversations of each kind, with answers that can be known from training."""
    answers = {row["answer"] for row in train}
    known = {word for row in train for word in words_of(f"{row['question']} {row['answer']}")}
    spoken = {word for answer in answers for word in words_of(answer)}
    chosen, counts = [], Counter()
    for row in random.Random(seed).sample(held, len(held)):
        new = row["answer"] not in answers
        fits = new == (row["held"] == "answer") or row["held"] == "scene"
        key = row["kind"], row["held"]
        fits &= known.issuperset(words_of(row["question"])) and spoken.issuperset(words_of(row["answer"]))
        if fits and counts[key] < EVAL_OF_A_KIND[row["held"]]:
            counts[key] += 1
            chosen.append(row)
    return sorted(chosen, key=lambda row: (row["kind"], row["held"]))


def words_of(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return re.findall(r"[a-z']+", text.lower())


def count_figures(rows: Sequence[dict]) -> dict:
    """What `figures.json` says of a corpus."""
    figures: dict = {}
    for name, chosen in (
        ("closed domain", [row for row in rows if row["kind"] != "repeat"]),
        ("repeat", [row for row in rows if row["kind"] == "repeat"]),
    ):
        lengths = [len(words_of(row["answer"])) for row in chosen]
        figures[name] = {
            "train conversations": sum(row["split"] == "train" for row in chosen),
            "eval conversations": sum(row["split"] == "eval" for row in chosen),
            "questions": len({row["question"] for row in chosen}),
            "answers": len({row["answer"] for row in chosen}),
            "train answers": len({row["answer"] for row in chosen if row["split"] == "train"}),
            "words of answers": len({word for row in chosen for word in words_of(row["answer"])}),
            "words of questions": len({word for row in chosen for word in words_of(row["question"])}),
            "words an answer": round(sum(lengths) / len(lengths), 2),
            "longest answer": max(lengths),
            "scenes": len({json.dumps(row["scene"]) for row in chosen if row["scene"]}),
            "eval": dict(sorted(Counter(row["held"] for row in chosen if row["held"]).items())),
            "kinds": dict(Counter(row["kind"] for row in chosen).most_common()),
        }
    return figures


def plot_kinds(rows: Sequence[dict], path: Path) -> None:
    figure, (kinds, lengths) = new_plot(1, 2)
    counts = Counter(row["kind"] for row in rows).most_common()
    kinds.barh([kind for kind, _ in counts][::-1], [count for _, count in counts][::-1])
    kinds.set_xlabel("conversations")
    spread = Counter(len(words_of(answer)) for answer in {row["answer"] for row in rows})
    lengths.bar(list(spread), list(spread.values()))
    lengths.set_xlabel("words of an answer")
    lengths.set_ylabel("distinct answers")
    save_plot(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Writes the corpus, its figures and their plot."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--size", type=int, help="answers of each sort that has no end (default: 700, quick: 20)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    source = digest_of_files(__file__, words.__file__)
    settings = {"source": source, "seed": options.seed, "size": options.size or (20 if options.quick else 700)}

    def make(folder: Path) -> dict:
        rows = make_conversations(settings["seed"], settings["size"])
        write_lines(folder / "conversations.jsonl", rows)
        plot_kinds(rows, folder / "figures.png")
        return count_figures(rows)

    run_stage(options.work / "corpus", [], settings, make, ["conversations.jsonl"])


if __name__ == "__main__":
    sys.exit(main())
