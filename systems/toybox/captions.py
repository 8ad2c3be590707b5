"""Captions of the toybox, vocabularies, scored and held-out pairs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from systems.toybox.finishes import FINISHES
from systems.toybox.objects import COLOURS, OBJECTS

VIEWS = ("front", "side", "back", "overhead")
MARKS = {"striped": "stripes", "spotted": "spots"}
"""The noun of each finish that has a second colour."""
FIRST_OBJECTS = tuple(OBJECTS)[:16]
"""The objects the first prior knows."""
FIRST_COLOURS = tuple(COLOURS)[:8]
"""The colours the first prior knows; all of its objects are plain."""
SCORED = tuple((FIRST_COLOURS[i % 8], name) for i, name in enumerate(FIRST_OBJECTS))
"""The 16 pairs the main job is scored on: each object once, colour index i mod 8."""
FIRST_HELD_OUT = (
    ("blue", "sphere"),
    ("yellow", "torus"),
    ("pink", "cone"),
    ("green", "cylinder"),
    ("cyan", "mushroom"),
    ("purple", "tree"),
    ("orange", "house"),
    ("yellow", "mug"),
    ("red", "chair"),
    ("pink", "table"),
    ("green", "rocket"),
    ("purple", "car"),
)
"""Pairs the first prior was not trained on."""
HELD_OUT = (
    *FIRST_HELD_OUT,
    *(("red", "teapot"), ("white", "teapot")),
    *(("green", "sailboat"), ("black", "sailboat")),
    *(("blue", "airplane"), ("pink", "airplane")),
    *(("purple", "duck"), ("cyan", "duck")),
    *(("orange", "lamp"), ("blue", "lamp")),
    *(("purple", "key"), ("green", "key")),
    *(("pink", "guitar"), ("yellow", "guitar")),
    *(("cyan", "boot"), ("white", "boot")),
    *(("red", "rabbit"), ("orange", "rabbit")),
    *(("black", "robot"), ("yellow", "robot")),
)
"""Pairs of body colour and object that no training sample shows, whatever the finish;
the model has to put them together itself."""


@dataclass(frozen=True)
class Caption:
    """The content of a prompt; None for what it leaves open.

    Attributes:
        name: A key of `OBJECTS`; None for the empty prompt.
        colour: Colour of the body, a key of `COLOURS`.
        finish: A key of `FINISHES`.
        second: Colour of the stripes or spots, a key of `COLOURS`.
        view: One of `VIEWS`.
        normal: Whether the prompt asks for a normal map.
    """

    name: str | None
    colour: str | None = None
    finish: str = "plain"
    second: str | None = None
    view: str | None = None
    normal: bool = False

    @property
    def text(self) -> str:
        """The caption, spelled as in the training of the priors."""
        if self.name is None:
            return ""
        words = f"{self.colour} {self.name}" if self.colour else self.name
        text = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        if self.finish != "plain":
            second = f"{self.second} " if self.second else ""
            text = f"{text} with {second}{MARKS[self.finish]}"
        if self.normal:
            text = f"normal map of {text}"
        return f"{text}, {self.view} view" if self.view else text


def caption(colour: str | None, name: str, view: str | None, normal: bool) -> str:
    """The caption of a plain object, without the parts that are None."""
    return Caption(name, colour, view=view, normal=normal).text


def view_of(azimuth: float, elevation: float) -> str:
    """The word for a camera, in degrees: overhead above 60°, else by quadrant."""
    if elevation > 60:
        return "overhead"
    around = (azimuth + 45) % 360
    return ("front", "side", "back", "side")[int(around // 90)]


def vocabulary() -> list[str]:
    """Every word of the second prior's captions, in a fixed order."""
    words = ["a", "an", ",", "normal", "map", "of", "view", *VIEWS]
    words += ["with", *MARKS.values(), *COLOURS]
    words += [word for name in OBJECTS for word in name.split()]
    return list(dict.fromkeys(words))


@dataclass(frozen=True)
class Known:
    """The vocabulary of a prior.

    Attributes:
        objects: Keys of `OBJECTS`.
        colours: Keys of `COLOURS`.
        finishes: Keys of `FINISHES`.
    """

    objects: tuple[str, ...] = tuple(OBJECTS)
    colours: tuple[str, ...] = tuple(COLOURS)
    finishes: tuple[str, ...] = tuple(FINISHES)

    @classmethod
    def of_words(cls, words: Collection[str]) -> Known:
        """The objects, colours and finishes in the words of a tokenizer."""
        return cls(
            tuple(n for n in OBJECTS if all(word in words for word in n.split())),
            tuple(colour for colour in COLOURS if colour in words),
            tuple(f for f in FINISHES if MARKS.get(f, "a") in words),
        )
