import pytest

from systems.toybox.captions import (
    HELD_OUT,
    SCORED,
    VIEWS,
    caption,
    check,
    parse,
    view_of,
    vocabulary,
)
from systems.toybox.objects import COLOURS, OBJECTS

EXAMPLES = [
    *(("green", "tree"), ("red", "mushroom"), ("blue", "mug")),
    *(("yellow", "chair"), ("red", "cube")),
]


def test_twelve_pairs_are_held_out_and_none_is_scored_or_an_example() -> None:
    assert len(set(HELD_OUT)) == 12
    assert not set(HELD_OUT) & {*SCORED, *EXAMPLES}
    assert all(colour in COLOURS and name in OBJECTS for colour, name in HELD_OUT)


def test_scored_pairs_are_each_object_once_colour_number_mod_8() -> None:
    colours = list(COLOURS)
    assert [(colours[i % 8], name) for i, name in enumerate(OBJECTS)] == list(SCORED)
    assert len(OBJECTS) == 16


@pytest.mark.parametrize(
    ("azimuth", "elevation", "view"),
    [
        *((0, 0, "front"), (44, 59, "front"), (-44, 0, "front"), (46, 0, "side")),
        *((-90, 0, "side"), (180, 0, "back"), (-136, 0, "back"), (0, 61, "overhead")),
    ],
)
def test_view_words(azimuth: float, elevation: float, view: str) -> None:
    assert view_of(azimuth, elevation) == view


def test_every_caption_is_in_the_vocabulary_and_names_its_pair() -> None:
    for colour in COLOURS:
        for name in OBJECTS:
            for view in (*VIEWS, None):
                for normal in (False, True):
                    assert parse(caption(colour, name, view, normal)) == (colour, name)
    assert len(set(vocabulary())) == len(vocabulary())


def test_an_orange_is_an() -> None:
    assert caption("orange", "car", "side", False) == "an orange car, side view"
    assert caption(None, "car", None, True) == "normal map of a car"


def test_unknown_words_are_named_with_the_nearest_known_and_a_way_out() -> None:
    with pytest.raises(ValueError, match="does not know") as caught:
        check("a purpel mushrom on a zebra")
    text = str(caught.value)
    assert "`purpel` (did you mean purple?)" in text
    assert "`mushrom` (did you mean mushroom?)" in text
    assert "`zebra`" in text
    assert "python -m systems.toybox list" in text
    assert "pretrained_model_name_or_path" in text


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("a mushroom", "names no colour"),
        ("a red view", "names no object"),
        ("a red blue mug", r"names 2 colours \(red, blue\)"),
        ("a red car, a house", r"names 2 objects \(house, car\)"),
    ],
)
def test_a_prompt_without_one_pair_is_refused(prompt: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(prompt)


def test_an_ice_cream_cone_is_not_a_cone() -> None:
    assert parse("a pink ice cream cone") == ("pink", "ice cream cone")
