"""What the toybox is called: captions, vocabulary, scored and held-out pairs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from systems.toybox.objects import COLOURS, OBJECTS

VIEWS = ("front", "side", "back", "overhead")
SCORED = tuple(
    (list(COLOURS)[i % len(COLOURS)], name) for i, name in enumerate(OBJECTS)
)
"""The 16 pairs the main job is scored on: each object once, colour i mod 8."""
HELD_OUT = (
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
"""Pairs no training sample shows; the model has to put them together itself."""


def view_of(azimuth: float, elevation: float) -> str:
    """The word for a camera, in degrees: overhead above 60°, else by quadrant."""
    if elevation > 60:
        return "overhead"
    around = (azimuth + 45) % 360
    return ("front", "side", "back", "side")[int(around // 90)]


def caption(colour: str | None, name: str, view: str | None, normal: bool) -> str:
    """Spell a caption out; what is None is left out."""
    words = f"{colour} {name}" if colour else name
    article = "an" if words[0] in "aeiou" else "a"
    text = f"{article} {words}"
    if normal:
        text = f"normal map of {text}"
    return f"{text}, {view} view" if view else text


def vocabulary() -> list[str]:
    """Every word the model knows, in a fixed order."""
    words = ["a", "an", ",", "normal", "map", "of", "view", *VIEWS, *COLOURS]
    words += [word for name in OBJECTS for word in name.split()]
    return list(dict.fromkeys(words))


def split(prompt: str) -> list[str]:
    """A prompt as lower-case words and commas."""
    return re.findall(r"[^\s,]+|,", prompt.lower())


def check(prompt: str) -> None:
    """Refuse words the model does not know.

    Raises:
        ValueError: Names the words and the nearest known ones.
    """
    known = vocabulary()
    unknown = [word for word in dict.fromkeys(split(prompt)) if word not in known]
    if not unknown:
        return
    hints = "; ".join(_hint(word, known) for word in unknown)
    raise ValueError(
        f"The embedded prior does not know {hints}. It knows {len(OBJECTS)} objects in "
        f"{len(COLOURS)} colours: `python -m systems.toybox list` shows them. For "
        "other prompts name a hub model or a local folder: "
        "`system.guidance.pretrained_model_name_or_path=…`."
    )


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"`{word}`" + (f" (did you mean {' or '.join(near)}?)" if near else "")


def parse(prompt: str) -> tuple[str, str]:
    """The colour and the object a prompt names.

    Raises:
        ValueError: A word is unknown, or there is not one colour and one object.
    """
    check(prompt)
    text = f" {' '.join(split(prompt))} "
    found = [name for name in OBJECTS if f" {name} " in text]
    # The cone of an ice cream cone is no object of its own.
    names = [n for n in found if not any(n != m and n in m for m in found)]
    colours = [word for word in split(prompt) if word in COLOURS]
    for kind, values in (("colour", colours), ("object", names)):
        if len(values) != 1:
            what = f"{len(values)} {kind}s ({', '.join(values)})" if values else None
            raise ValueError(
                f"`{prompt}` names {what or f'no {kind}'}: write one colour and one "
                "object, such as `a red mushroom`. `python -m systems.toybox list` "
                "shows them."
            )
    return colours[0], names[0]


def view_in(prompt: str) -> str | None:
    """The view a prompt asks for, None if it leaves that open."""
    return next((word for word in split(prompt) if word in VIEWS), None)
