import pytest

from systems.toybox.captions import FIRST_COLOURS, FIRST_OBJECTS, Known
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.reader import parse, read
from systems.toybox.synonyms import (
    ADJECTIVES,
    COLOUR_SYNONYMS,
    FILLERS,
    NOUNS,
    OBJECT_SYNONYMS,
    RELATED,
    VIEW_WORDS,
)


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("Red Mushroom!", "a red mushroom"),
        ("red mushrooms", "a red mushroom"),
        ("a DSLR photo of a red mushroom, highly detailed, 8k", "a red mushroom"),
        ("3d render of a toy car, yellow", "a yellow car"),
        ("white snowmen", "a white snowman"),
        ("red boxes", "a red cube"),
        ("ice cream cones in pink", "a pink ice cream cone"),
        ("a blue desk lamp seen from above", "a blue lamp, overhead view"),
        ("Green Christmas tree, rear view", "a green tree, back view"),
        ("a mug", "a mug"),
        ("blurry, low quality", ""),
        ("", ""),
    ],
)
def test_prompts_as_people_write_them(prompt: str, caption: str) -> None:
    assert read(prompt).text == caption


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("a red and white striped mug", "a red mug with white stripes"),
        ("stripy red & blue boots", "a red boot with blue stripes"),
        ("white spotted red mushroom", "a red mushroom with white spots"),
        ("a red mushroom with white polka dots", "a red mushroom with white spots"),
        ("white stripes on a red mug", "a red mug with white stripes"),
        ("a mug with white stripes, red", "a red mug with white stripes"),
        ("a mug with red and white stripes", "a red mug with white stripes"),
        ("a red mug striped with blue", "a red mug with blue stripes"),
        ("a mug with white stripes", "a mug with white stripes"),
        ("a spotted red mug", "a red mug with white spots"),
        ("a spotted white mug", "a white mug with black spots"),
        ("a striped mug", "a mug with stripes"),
    ],
)
def test_the_second_colour_is_that_of_the_marks(prompt: str, caption: str) -> None:
    assert read(prompt).text == caption


def _complaint(prompt: str, known: Known | None = None) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read(prompt, known or Known())
    return str(caught.value)


def test_an_unknown_object_is_refused_with_objects_and_a_way_out() -> None:
    for prompt in ("a pineapple", "purple pineapples", "a yellow pineapple, side view"):
        text = _complaint(prompt)
        assert "pineapple" in text
        assert "nearest objects: ice cream cone, mushroom" in text
        assert "purple" not in text.split("known")[-1].replace(prompt, "")
        assert "did you mean" not in text
        assert "pretrained_model_name_or_path" in text
        assert "systems.toybox list" in text
    assert "(nearest objects: mushroom" in _complaint("a red mushrom")


def test_a_misspelled_colour_is_told_the_colour() -> None:
    assert "`purpel` (did you mean purple?)" in _complaint("a purpel mushroom")
    assert "`wooden`." in _complaint("a wooden red table")


def test_the_first_prior_refuses_what_only_the_second_knows() -> None:
    first = Known(FIRST_OBJECTS, FIRST_COLOURS, ("plain",))
    for prompt, word in (
        ("a red teapot", "teapot"),
        ("a white mug", "white"),
        ("a striped mug", "striped"),
    ):
        text = _complaint(prompt, first)
        assert f"`{word}` (the second one, `toybox2`, does)" in text
        assert "16 objects in 8 colours" in text
        read(prompt)


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("a mushroom", "names no colour"),
        ("a red view", "names no object"),
        ("", "names no object"),
        ("a red blue mug", r"names 2 colours \(red, blue\)"),
        ("a red mug with red stripes", r"names 2 colours \(red, red\)"),
        ("a red car, a house", r"names 2 objects \(car, house\)"),
        ("a red mug with stripes and spots", r"names 2 finishes \(striped, spotted\)"),
        ("a red mug, front view, side view", r"names 2 views \(front, side\)"),
    ],
)
def test_a_prompt_without_one_answer_is_refused(prompt: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(prompt)


def test_an_ice_cream_cone_is_not_a_cone() -> None:
    assert parse("a pink ice cream cone").name == "ice cream cone"


def test_tables_name_what_exists_and_contradict_nothing() -> None:
    assert set(OBJECT_SYNONYMS.values()) <= set(OBJECTS)
    assert set(COLOUR_SYNONYMS.values()) <= set(COLOURS)
    assert {name for names in RELATED.values() for name in names} <= set(OBJECTS)
    meanings = [*OBJECTS, *OBJECT_SYNONYMS, *COLOURS, *COLOUR_SYNONYMS]
    meanings += [*ADJECTIVES, *NOUNS, *VIEW_WORDS, *FILLERS]
    twice = {word for word in meanings if meanings.count(word) > 1}
    assert not twice
    assert not set(RELATED) & set(meanings)
