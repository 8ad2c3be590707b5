"""Parsing of free-form prompts into captions.

Case, punctuation, articles, plurals and the usual fillers ("a DSLR photo of …, highly
detailed, 8k") have no effect, and synonyms are understood. Any other word is refused,
with the nearest known one, and never ignored. A finish without a second colour uses
white, or black on white bodies.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from systems.toybox import synonyms
from systems.toybox.captions import Caption, Known
from systems.toybox.finishes import FINISHES
from systems.toybox.objects import COLOURS, OBJECTS

EVERYTHING = Known()
_IRREGULAR = {"snowmen": "snowman", "tori": "torus", "fishes": "fish", "mice": "mouse"}


@dataclass(frozen=True)
class _Term:
    """A phrase with a meaning: its kind, its meaning and its spelling."""

    kind: str
    value: str
    written: str


def _lexicon() -> Mapping[str, tuple[str, str]]:
    """Kind and meaning of every phrase."""
    entries: dict[str, tuple[str, str]] = {}
    for kind, phrases in (
        ("filler", dict.fromkeys(synonyms.FILLERS, "")),
        ("normal", dict.fromkeys(synonyms.NORMAL_MAP, "")),
        ("view", synonyms.VIEW_WORDS),
        ("adjective", synonyms.ADJECTIVES),
        ("noun", synonyms.NOUNS),
        ("colour", {**{c: c for c in COLOURS}, **synonyms.COLOUR_SYNONYMS}),
        ("object", {**{n: n for n in OBJECTS}, **synonyms.OBJECT_SYNONYMS}),
    ):
        entries.update({phrase: (kind, value) for phrase, value in phrases.items()})
    return entries


_LEXICON = _lexicon()
_LONGEST = max(len(phrase.split()) for phrase in _LEXICON)


def read(prompt: str, known: Known = EVERYTHING) -> Caption:
    """The content of a prompt.

    Args:
        prompt: One object at most, with what is said about it; fillers alone, or
            nothing, are the empty prompt.
        known: The vocabulary of the prior.

    Raises:
        ValueError: A word is unknown, or the prompt contradicts itself.
    """
    terms = _terms(prompt)
    _refuse_unknown(prompt, terms, known)

    def values(kind: str) -> list[str]:
        return list(dict.fromkeys(t.value for t in terms if t.kind == kind))

    names, views = values("object"), values("view")
    finishes = list(dict.fromkeys([*values("adjective"), *values("noun")]))
    for what, found in (("object", names), ("view", views), ("finish", finishes)):
        if len(found) > 1:
            kinds = "finishes" if what == "finish" else f"{what}s"
            raise ValueError(
                f"`{prompt}` names {len(found)} {kinds} ({', '.join(found)}): write "
                "one, such as `a red mug with white stripes, front view`."
            )
    if not names:
        if len(terms) == sum(t.kind == "filler" for t in terms):
            return Caption(None)
        raise ValueError(
            f"`{prompt}` names no object: write one, such as `a red mushroom`. "
            "`python -m systems.toybox list` shows them."
        )
    finish = finishes[0] if finishes else "plain"
    colour, second = _colours(prompt, terms, finish)
    normal = any(t.kind == "normal" for t in terms)
    return Caption(names[0], colour, finish, second, next(iter(views), None), normal)


def parse(prompt: str) -> Caption:
    """The content of a prompt that must name object and colour.

    Raises:
        ValueError: As `read`, or one of the two is missing.
    """
    asked = read(prompt)
    for kind, value in (("object", asked.name), ("colour", asked.colour)):
        if value is None:
            raise ValueError(
                f"`{prompt}` names no {kind}: write one colour and one object, such as "
                "`a red mushroom`. `python -m systems.toybox list` shows them."
            )
    return asked


def _terms(prompt: str) -> list[_Term]:
    """The phrases of a prompt, longest first at each word; unknown words among them."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    terms: list[_Term] = []
    while words:
        for length in range(min(_LONGEST, len(words)), 0, -1):
            written = " ".join(words[:length])
            entry = _LEXICON.get(written) or _LEXICON.get(_singular(written))
            if entry is not None or length == 1:
                kind, value = entry or ("unknown", written)
                terms.append(_Term(kind, value, written))
                words = words[length:]
                break
    return terms


def _singular(phrase: str) -> str:
    """A phrase whose last word has lost its plural ending."""
    if phrase in _IRREGULAR:
        return _IRREGULAR[phrase]
    for ending in ("es", "s"):
        stem = phrase.removesuffix(ending)
        if stem != phrase and stem in _LEXICON:
            return stem
    return phrase


def _colours(
    prompt: str, terms: Sequence[_Term], finish: str
) -> tuple[str | None, str | None]:
    """The body's colour and that of its marks."""
    colours = [(i, t.value) for i, t in enumerate(terms) if t.kind == "colour"]
    names = list(dict.fromkeys(value for _, value in colours))
    if len(names) > 1 + (finish != "plain") or len(names) < len(colours):
        raise ValueError(
            f"`{prompt}` names {len(colours)} colours "
            f"({', '.join(value for _, value in colours)}): write one, such as `a red "
            "mug`, or two different ones, such as `a red mug with white stripes`."
        )
    if finish == "plain":
        return (names[0] if names else None), None
    marks = [i for i, t in enumerate(terms) if t.kind in ("adjective", "noun")]
    thing = next(i for i, t in enumerate(terms) if t.kind == "object")
    if len(names) == 2:
        # "Mug with white stripes, red" and "white striped red mug", as against "red
        # mug with white stripes", "red and white striped mug" and "red mug striped
        # with white".
        first, second = colours[0][0], colours[1][0]
        named = terms[marks[0]].kind == "noun" and first == marks[0] - 1
        swapped = named or first < marks[0] < second < thing
        return (names[1], names[0]) if swapped else (names[0], names[1])
    if not names:
        return None, None
    if terms[marks[0]].kind == "noun" and thing < colours[0][0] < marks[0]:
        return None, names[0]
    return names[0], "black" if names[0] == "white" else "white"


def _refuse_unknown(prompt: str, terms: Sequence[_Term], known: Known) -> None:
    """Refuse words without a meaning, and meanings the prior does not know."""
    lists = {"object": known.objects, "colour": known.colours}
    lists |= {"adjective": known.finishes, "noun": known.finishes}
    hints: list[str] = []
    for i, term in enumerate(terms):
        if term.kind == "unknown":
            after = terms[i + 1 :]
            described = any(t.kind in ("object", "unknown") for t in after)
            hints.append(_hint(term.written, known, described))
        elif term.kind in lists and term.value not in lists[term.kind]:
            hints.append(f"`{term.written}` (the second one, `toybox2`, does)")
    if not hints:
        return
    raise ValueError(
        f"The embedded prior does not know {'; '.join(dict.fromkeys(hints))}. It knows "
        f"{len(known.objects)} objects in {len(known.colours)} colours: `python -m "
        "systems.toybox list` shows them. For other prompts name a hub model or a "
        "local folder: `system.guidance.pretrained_model_name_or_path=…`."
    )


def _hint(word: str, known: Known, described: bool) -> str:
    """A word and the nearest known ones: for a noun objects, never a colour."""
    if described:
        finishes = [f for f in FINISHES if f in known.finishes]
        near = difflib.get_close_matches(word, [*known.colours, *finishes], 2, 0.6)
        near = near or difflib.get_close_matches(word, known.objects, 2, 0.7)
        return f"`{word}`" + (f" (did you mean {' or '.join(near)}?)" if near else "")
    single = word if word in synonyms.RELATED else word.removesuffix("s")
    near = [n for n in synonyms.RELATED.get(single, ()) if n in known.objects]
    near = near or difflib.get_close_matches(word, known.objects, 3, 0.35)
    return f"`{word}`" + (f" (nearest objects: {', '.join(near)})" if near else "")
