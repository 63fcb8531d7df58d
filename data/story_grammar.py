"""Simple stories from a grammar: as many as anybody wants, all different, and a parser that says what a sentence of them is.

A sentence is one of `TEMPLATES`: words and slots. A slot such as `{place}` takes a word from its list; in one sentence the
same slot has the same word. `{h}` and `{f}` are two different characters, the hero and a friend, each a girl, a boy or an
animal; `{h.they}`, `{h.them}`, `{h.their}` are pronouns that agree with them, `{h.kind}` is what they are ("girl", "dog").
A story (`stories`) keeps its characters, its toy and its place from the first sentence to the last. `parse_sentence` reads one
sentence by the same tables and says which template it is, or None; the vocabulary is about that of the simplest children's
stories.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field


def _words(text: str) -> list[str]:
    return text.split()


GIRLS = _words("Lily Mia Anna Sue Lucy Amy Emma Rose Kate Jane Ella Zoe")
BOYS = _words("Tom Ben Max Sam Tim Jack Leo Bob Dan Finn Joe Ned")
ANIMALS = _words(
    "cat dog bear bird rabbit mouse fox duck frog pig owl horse cow hen fish turtle lion monkey elephant "
    "squirrel sheep goat puppy kitten"
)
PRONOUNS = {  # they, them, their
    "girl": ("she", "her", "her"),
    "boy": ("he", "him", "his"),
    "animal": ("it", "it", "its"),
}
GENDERS = ("girl", "boy", "animal")

# Each list begins with its commonest words: word i has a weight of 1 / (i + 2).
SLOTS = {
    "adj": _words(
        "little big happy kind nice brave funny good small pretty old tiny quiet clever shy strong gentle "
        "lovely young friendly silly lazy careful polite"
    ),
    "look": _words(
        "new big red shiny small blue old pretty green yellow soft tiny round white long brown black pink "
        "purple bright golden wooden heavy special"
    ),
    "feeling": _words(
        "happy sad tired scared proud hungry excited angry cold surprised sorry lonely worried sleepy thirsty curious"
    ),
    "thing": _words(
        "ball toy doll hat car book box kite boat drum cup bell balloon train truck flower stone key ring "
        "umbrella puzzle robot basket blanket pencil ladder bucket necklace"
    ),
    "food": _words(
        "apple cake cookie egg banana carrot sandwich pie pear orange strawberry pancake potato tomato cheese bread soup"
    ),
    "place": _words(
        "park garden forest farm beach lake river school store hill zoo field mountain village kitchen "
        "library playground pond market bridge"
    ),
    "home": _words("house tree cave town village castle barn nest cottage hole tent"),
    "spot": _words("tree bed table bush rock bridge chair door fence leaf window blanket mushroom"),
    "near": _words("under behind near beside on"),
    "family": _words("mom dad sister brother grandma grandpa mother father cousin uncle"),
    "weather": _words("sunny warm cold rainy windy hot cloudy snowy"),
    "do": _words("play run jump sing dance swim read draw climb walk hide sleep paint cook explore whistle"),
    "did": _words("played ran jumped sang danced swam laughed read walked talked smiled painted giggled explored"),
    "moved": _words("went ran walked came hurried"),
    "saw": _words("saw met found heard followed noticed"),
    "time": _words("day morning night afternoon evening"),
    "very": _words("very so really"),
    "liked": _words("liked loved wanted"),
}
BOUND = ("thing", "food", "place", "home", "look")  # what stays the same all through a story

TEMPLATES = {
    "opening": [
        "once upon a time there was a {adj} {h.kind} named {h}.",
        "once upon a time , there lived a {adj} {h.kind} in a {home}.",
        "once there was a {adj} {h.kind} who lived in a {home}.",
        "{h} was a {adj} {h.kind}.",
        "one {weather} {time} , {h} {moved} to the {place}.",
    ],
    "about": [
        "{h} lived in a {adj} {home} with {h.their} {family}.",
        "{h} had a {look} {thing}.",
        "{h.they} {liked} to {do} in the {place}.",
        "{h} {liked} to {do} with {h.their} {family}.",
        "{h} had a friend named {f}.",
        "{h.their} friend was a {adj} {f.kind}.",
        "{h.they} loved {h.their} {look} {thing} {very} much.",
        "every {time} , {h} {did} in the {place}.",
    ],
    "event": [
        "one {time} , {h} {moved} to the {place} with {f}.",
        "one {time} , {h} {moved} to the {place} with {h.their} {family}.",
        "in the {place} , {h.they} {saw} a {adj} {f.kind}.",
        "{h} {saw} a {look} {thing} {near} the {spot}.",
        "{h} wanted to {do} , but {h.they} was too {feeling}.",
        "{h} lost {h.their} {thing} in the {place}.",
        "{h.they} looked for the {thing} {near} the {spot}.",
        "suddenly , the {thing} fell into the {place}.",
        "the {thing} was {look} and {very} {adj}.",
        "it was a {weather} {time}.",
        "{h} ate a {look} {food} and felt {feeling}.",
        "{h.they} wanted to eat the {food} , but {h.their} {family} said no.",
        "{h} was {very} {feeling}.",
        "{h.they} felt {feeling} and began to {do}.",
        "{h} could not find {h.their} {family}.",
    ],
    "friend": [
        "{f} saw that {h} was {feeling}.",
        "{f} gave {h} a {look} {thing}.",
        "{f} helped {h.them} to find the {thing}.",
        "{h} asked {f} for help.",
        "{f} was {very} {feeling} too.",
        "{h} and {f} {did} all {time}.",
        "{h} and {f} played with the {thing}.",
        "{h} shared {h.their} {food} with {f}.",
        "{h} said sorry to {f} and gave {f.them} the {thing}.",
        "they {did} and {did.2} in the {place}.",
    ],
    "ending": [
        "{h} was {very} happy and {moved} home.",
        "{h} hugged {h.their} {family} and went to sleep.",
        "from that {time} on , {h} and {f} were best friends.",
        "they lived happily ever after.",
        "it was the best {time} ever!",
        "{h} thanked {f} and they {did} together.",
        "{h} never lost {h.their} {thing} again.",
    ],
}
# How many sentences of each part a story has: at least, at most. Within a part no template comes twice.
SHAPE = {"opening": (1, 1), "about": (1, 2), "event": (2, 4), "friend": (1, 3), "ending": (1, 2)}

STORIES = 200_000  # in the corpus
VALIDATION_STORIES = 121  # … of which the first so many are for validation: about 10,000 tokens of the BPE of 1,024
SEED = 2024

MARKS = frozenset(".,!")
_WORD = re.compile(r"[A-Za-z]+|[.,!]")
_AN = re.compile(r"\ba (?=[aeiou])")
_END = re.compile(r"(?<=[.!])\s*")
_SLOT = re.compile(r"\{([\w.]+)\}|([A-Za-z]+|[.,!])")


def split_template(template: str) -> list[tuple[str, str, str]]:
    """A template as a list of ("", word or mark, "") and, of a slot {name.which}, (name, the slot's text, which)."""
    return [
        (found[1].partition(".")[0], found[1], found[1].partition(".")[2]) if found[1] else ("", found[2], "")
        for found in _SLOT.finditer(template)
    ]


PARTS = {template: split_template(template) for templates in TEMPLATES.values() for template in templates}
# The same as pieces of text, (whether a slot, text); the slots that are drawn, (list, slot); the character that is named.
PIECES = {one: [(bool(i % 2), text) for i, text in enumerate(re.split(r"\{([\w.]+)\}", one.replace(" ,", ",")))] for one in PARTS}
OPEN_SLOTS = {one: [(name, text) for name, text, _ in parts if name in SLOTS] for one, parts in PARTS.items()}
NAMED = {one: one.partition("named {")[2][0] for one in PARTS if "named {" in one}
LONGEST = max(map(len, PARTS.values())) + 4  # words and marks of a sentence, at most: an animal takes two words


# ------------------------------------------------------------------------------------------- characters


@dataclass(frozen=True)
class Character:
    """A girl or a boy with a name, or an animal."""

    gender: str
    word: str  # the name, or the animal

    @functools.cached_property
    def forms(self) -> dict[str, str]:
        """What this character is called, by form: "" as a subject or object, "kind", "they", "them", "their"."""
        animal = self.gender == "animal"
        pronouns = dict(zip(("they", "them", "their"), PRONOUNS[self.gender]))
        return {"": f"the {self.word}" if animal else self.word, "kind": self.word if animal else self.gender, **pronouns}


NAMES = {**dict.fromkeys(GIRLS, "girl"), **dict.fromkeys(BOYS, "boy")}
CHARACTERS = [Character("girl", word) for word in GIRLS] + [Character("boy", word) for word in BOYS]
CHARACTERS += [Character("animal", word) for word in ANIMALS]


def known_words() -> set[str]:
    """Every word and mark that a story can have, as the tables write it (the first word of a sentence has a capital)."""
    words = {word for values in SLOTS.values() for word in values} | {*GIRLS, *BOYS, *ANIMALS, "girl", "boy", "an"}
    words |= {word for forms in PRONOUNS.values() for word in forms}
    return words | {text for parts in PARTS.values() for name, text, _ in parts if not name} | {"the"}


# ------------------------------------------------------------------------------------------- writing


class _Dice:
    """Random choices that every version of Python makes alike: only `random()`, whose numbers are promised to stay."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def below(self, number: int) -> int:
        """A whole number from 0 to number − 1."""
        return int(self._random.random() * number)

    def word(self, words: list[str]) -> str:
        """A word of a list, the first ones more often: word i has a weight of 1 / (i + 2)."""
        ends = _ends(len(words))
        return words[bisect.bisect_right(ends, self._random.random() * ends[-1])]

    def some(self, number: int, values: list) -> list:
        """So many different values of a list, in a random order."""
        left = list(values)
        return [left.pop(self.below(len(left))) for _ in range(number)]


@functools.cache
def _ends(number: int) -> list[float]:
    return list(itertools.accumulate(1 / (i + 2) for i in range(number)))


def realize(words: list[str]) -> str:
    """Words and marks as a sentence: "a" before a vowel becomes "an", marks have no space before them, a capital begins it."""
    text = words[0]
    for word, following in zip(words[1:], [*words[2:], "."]):
        if word in MARKS:
            text += word
        else:
            text += " an" if word == "a" and following[0] in "aeiouAEIOU" else " " + word
    return text[0].upper() + text[1:]


def write_sentence(template: str, values: dict[str, str], dice: _Dice) -> str:
    """A sentence of this template. `values` has the words of the characters and of some slots; the others are drawn."""
    drawn = dict(values)
    for name, slot in OPEN_SLOTS[template]:
        if slot not in drawn:
            drawn[slot] = dice.word(SLOTS[name])
    text = _AN.sub("an ", "".join([drawn[piece] if is_slot else piece for is_slot, piece in PIECES[template]]))
    return text[0].upper() + text[1:]


def write_story(dice: _Dice) -> str:
    """One story: opening, what the hero is like, what happens, the friend, the end."""
    roles = dict(zip("hf", dice.some(2, CHARACTERS)))
    values = {role + "." * bool(form) + form: text for role, one in roles.items() for form, text in one.forms.items()}
    values.update((slot, dice.word(SLOTS[slot])) for slot in BOUND)
    sentences = []
    for part, (least, most) in SHAPE.items():
        fitting = [one for one in TEMPLATES[part] if one not in NAMED or roles[NAMED[one]].gender != "animal"]
        number = least + dice.below(most - least + 1)
        sentences += [write_sentence(template, values, dice) for template in dice.some(number, fitting)]
    return " ".join(sentences)


def stories(number: int = STORIES, seed: int = SEED) -> Iterator[str]:
    """So many different stories; the same for the same seed, and of a larger number the first ones are the same."""
    dice, seen = _Dice(seed), set()
    while len(seen) < number:
        story = write_story(dice)
        key = hashlib.blake2b(story.encode(), digest_size=8).digest()  # a story whose hash came before is left out
        if key not in seen:
            seen.add(key)
            yield story


def validation_stories() -> Iterator[tuple[str, str]]:
    """(name, text) of the corpus's stories for validation."""
    for number, story in enumerate(stories(VALIDATION_STORIES)):
        yield f"story {number}", story


def training_stories() -> Iterator[tuple[str, str]]:
    """(name, text) of the corpus's other stories; all differ from those for validation."""
    for number, story in itertools.islice(enumerate(stories(STORIES)), VALIDATION_STORIES, None):
        yield f"story {number}", story


def new_stories(number: int, but: int = 2_000) -> list[str]:
    """So many stories by another seed; those that are among the first `but` of the corpus are left out."""
    known = set(stories(but))
    return list(itertools.islice((story for story in stories(number + but, SEED + 1) if story not in known), number))


def fingerprint() -> str:
    """16 hex digits that differ where the corpus does."""
    tables = [SLOTS, TEMPLATES, SHAPE, BOUND, GIRLS, BOYS, ANIMALS, PRONOUNS, STORIES, VALIDATION_STORIES, SEED]
    return hashlib.sha256(json.dumps(tables).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------- reading


def sentences_of(text: str) -> tuple[list[str], str]:
    """The complete sentences of a text, each with its mark at the end, and the unfinished rest."""
    pieces = [piece for piece in _END.split(text.strip()) if piece]
    rest = pieces.pop() if pieces and pieces[-1][-1] not in ".!" else ""
    return pieces, rest


@dataclass
class _Reading:
    """What the slots of a sentence stand for so far."""

    words: list[str]
    at: int = 0
    slots: dict[str, str] = field(default_factory=dict)
    genders: dict[str, set[str]] = field(default_factory=dict)

    def next(self) -> str:
        self.at += 1
        return self.words[self.at - 1] if self.at <= len(self.words) else ""

    def agrees(self, role: str, genders: set[str]) -> bool:
        """Whether a character can still have one of these genders; then it has one of them."""
        self.genders[role] = self.genders.get(role, set(GENDERS)) & genders
        return bool(self.genders[role])

    def takes(self, name: str, text: str, which: str) -> bool:
        """Read one part of a template. False where the words are not what it wants."""
        word = self.next()
        if not name:
            return word == text or (word, text) == ("an", "a")
        if name not in ("h", "f"):
            return word in SLOTS[name] and self.slots.setdefault(text, word) == word
        if which == "":
            if word == "the":
                word = self.next()
                fits = word in ANIMALS and self.agrees(name, {"animal"})
            else:
                fits = word in NAMES and self.agrees(name, {NAMES[word]})
            return fits and self.slots.setdefault(name, word) == word
        if which == "kind":
            if word in ANIMALS:
                return self.agrees(name, {"animal"}) and self.slots.setdefault(name, word) == word
            return word in ("girl", "boy") and self.agrees(name, {word})
        place = ("they", "them", "their").index(which)
        return self.agrees(name, {gender for gender in GENDERS if PRONOUNS[gender][place] == word})


def parse_sentence(sentence: str) -> str | None:
    """The template that this sentence is of, or None where the grammar does not make it.

    Spaces, capitals and marks count too: the sentence has to be what `realize` writes.
    """
    words = _WORD.findall(sentence)
    if not words or words[0][:1].islower():
        return None
    if words[0] not in NAMES:
        words[0] = words[0][0].lower() + words[0][1:]
    if realize(["a" if word == "an" else word for word in words]) != sentence:
        return None
    for template, parts in PARTS.items():
        reading = _Reading(words)
        if all(reading.takes(*part) for part in parts) and reading.at == len(words):
            same = reading.slots.get("h") is not None and reading.slots.get("h") == reading.slots.get("f")
            if not same and "".join(reading.genders.get(NAMED.get(template, ""), ())) != "animal":
                return template
    return None
