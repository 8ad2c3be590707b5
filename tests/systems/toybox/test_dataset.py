import subprocess
import sys
from pathlib import Path

import pytest
import torch

from systems.toybox import dataset as data
from systems.toybox.captions import HELD_OUT, parse, split
from systems.toybox.objects import COLOURS, OBJECTS


def _build(seed: int = 0) -> data.Dataset:
    return data.build(samples=2, normals=2, size=8, seed=seed)


@pytest.fixture(scope="module")
def renders() -> data.Dataset:
    return _build()


def test_same_seed_same_bytes_in_another_process(renders: data.Dataset) -> None:
    program = (
        "import torch; torch.set_num_threads(1); from systems.toybox.dataset import *; "
        "print(build(samples=2, normals=2, size=8).fingerprint())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == renders.fingerprint()
    assert _build(seed=1).fingerprint() != renders.fingerprint()


def test_held_out_pairs_are_not_rendered_all_others_are(renders: data.Dataset) -> None:
    colours, names = list(COLOURS), list(OBJECTS)
    plain = renders.labels[renders.labels[:, 3] == 0].tolist()
    pairs = {(colours[colour], names[number]) for number, colour, _, _ in plain}
    assert not pairs & set(HELD_OUT)
    assert len(pairs) == 16 * 8 - 12
    normals = renders.labels[renders.labels[:, 3] == 1]
    assert set(normals[:, 0].tolist()) == set(range(16))


def test_no_training_caption_names_a_held_out_pair(renders: data.Dataset) -> None:
    _, captions = data.batch(renders, 6000, torch.Generator().manual_seed(0))
    named = set()
    for text in captions:
        if any(word in COLOURS for word in split(text)):
            named.add(parse(text))
    assert not named & set(HELD_OUT)
    assert len(named) == 16 * 8 - 12  # and all the others are named


def test_parts_of_captions_are_left_out_at_random(renders: data.Dataset) -> None:
    _, captions = data.batch(renders, 6000, torch.Generator().manual_seed(0))
    empty = sum(not text for text in captions) / len(captions)
    assert 0.085 < empty < 0.115
    given = [text for text in captions if text]
    without_view = sum("view" not in text for text in given) / len(given)
    assert 0.09 < without_view < 0.15
    plain = [text for text in given if "normal" not in text]
    assert len(plain) < len(given)
    no_colour = sum(not set(split(text)) & set(COLOURS) for text in plain) / len(plain)
    assert 0.03 < no_colour < 0.09


def test_a_batch_is_drawn_from_its_generator_alone(renders: data.Dataset) -> None:
    first = data.batch(renders, 8, torch.Generator().manual_seed(3))
    torch.rand(5)  # the global generator has no say
    again = data.batch(renders, 8, torch.Generator().manual_seed(3))
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]


def test_saved_and_loaded_are_the_same(renders: data.Dataset, tmp_path: Path) -> None:
    renders.save(tmp_path / "renders.safetensors")
    loaded = data.Dataset.load(tmp_path / "renders.safetensors")
    assert loaded.fingerprint() == renders.fingerprint()
