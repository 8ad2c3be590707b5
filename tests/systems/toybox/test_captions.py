import pytest

from systems.toybox.captions import (
    FIRST_COLOURS,
    FIRST_HELD_OUT,
    FIRST_OBJECTS,
    HELD_OUT,
    SCORED,
    VIEWS,
    Caption,
    Known,
    caption,
    view_of,
    vocabulary,
)
from systems.toybox.finishes import FINISHES
from systems.toybox.model import MAX_WORDS, make_tokenizer
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.reader import read

EXAMPLES = [
    *(("green", "tree"), ("red", "mushroom"), ("blue", "mug")),
    *(("yellow", "chair"), ("red", "cube")),
]


def test_held_out_pairs_are_neither_scored_nor_examples() -> None:
    assert len(set(FIRST_HELD_OUT)) == 12
    assert HELD_OUT[:12] == FIRST_HELD_OUT
    assert len(set(HELD_OUT)) == 32
    assert not set(HELD_OUT) & {*SCORED, *EXAMPLES}
    assert all(colour in COLOURS and name in OBJECTS for colour, name in HELD_OUT)


def test_scored_pairs_are_each_old_object_once_colour_index_mod_8() -> None:
    colours = list(COLOURS)
    assert list(SCORED) == [(colours[i % 8], n) for i, n in enumerate(FIRST_OBJECTS)]
    assert len(FIRST_OBJECTS) == 16
    assert len(FIRST_COLOURS) == 8


@pytest.mark.parametrize(
    ("azimuth", "elevation", "view"),
    [
        *((0, 0, "front"), (44, 59, "front"), (-44, 0, "front"), (46, 0, "side")),
        *((-90, 0, "side"), (180, 0, "back"), (-136, 0, "back"), (0, 61, "overhead")),
    ],
)
def test_view_words(azimuth: float, elevation: float, view: str) -> None:
    assert view_of(azimuth, elevation) == view


def test_every_caption_is_read_back_and_fits_the_text_encoder() -> None:
    tokenizer = make_tokenizer()
    known = set(vocabulary())
    for i, name in enumerate(OBJECTS):
        for j, colour in enumerate((*COLOURS, None)):
            for finish in FINISHES:
                second = list(COLOURS)[(j + 1 + i % 9) % 10]
                asked = Caption(
                    name,
                    colour,
                    finish,
                    second if finish != "plain" else None,
                    (*VIEWS, None)[(i + j) % 5],
                    bool(i % 2),
                )
                assert read(asked.text) == asked
                ids = tokenizer(asked.text).input_ids
                assert len(ids) <= MAX_WORDS
                assert tokenizer.unk_token_id not in ids
                assert set(asked.text.replace(",", " ,").split()) <= known
    assert len(known) == len(vocabulary())


def test_an_orange_is_an() -> None:
    assert caption("orange", "car", "side", False) == "an orange car, side view"
    assert caption(None, "car", None, True) == "normal map of a car"
    striped = Caption("mug", "red", "striped", "white", "front")
    assert striped.text == "a red mug with white stripes, front view"
    assert Caption(None).text == ""


def test_a_tokenizer_tells_what_its_prior_knows() -> None:
    words = ["a", *FIRST_COLOURS, *(w for name in FIRST_OBJECTS for w in name.split())]
    known = Known.of_words(words)
    assert known == Known(FIRST_OBJECTS, FIRST_COLOURS, ("plain",))
    assert Known.of_words(vocabulary()) == Known()
