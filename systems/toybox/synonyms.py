"""Synonyms of the toybox's words, and words without effect."""

from __future__ import annotations

from collections.abc import Mapping

OBJECT_SYNONYMS: Mapping[str, str] = {
    **dict.fromkeys(("ball", "orb", "globe"), "sphere"),
    **dict.fromkeys(("box", "block", "dice", "die"), "cube"),
    **dict.fromkeys(("donut", "doughnut", "ring"), "torus"),
    **dict.fromkeys(("traffic cone", "party hat"), "cone"),
    **dict.fromkeys(("can", "tube", "drum"), "cylinder"),
    **dict.fromkeys(("toadstool",), "mushroom"),
    **dict.fromkeys(("pine tree", "fir tree", "christmas tree", "fir", "pine"), "tree"),
    **dict.fromkeys(("cottage", "cabin", "hut", "home"), "house"),
    **dict.fromkeys(("cup", "coffee mug", "coffee cup", "tea cup", "teacup"), "mug"),
    **dict.fromkeys(("snow man",), "snowman"),
    **dict.fromkeys(("desk",), "table"),
    **dict.fromkeys(("ice cream", "icecream", "ice cream cornet"), "ice cream cone"),
    **dict.fromkeys(("spaceship", "space rocket", "rocket ship"), "rocket"),
    **dict.fromkeys(("automobile", "sports car", "sedan"), "car"),
    **dict.fromkeys(("goldfish",), "fish"),
    **dict.fromkeys(("tea pot", "kettle"), "teapot"),
    **dict.fromkeys(("sail boat", "sailing boat", "boat", "yacht"), "sailboat"),
    **dict.fromkeys(("aeroplane", "plane", "aircraft", "jet"), "airplane"),
    **dict.fromkeys(("rubber duck", "duckling"), "duck"),
    **dict.fromkeys(("desk lamp", "table lamp", "reading lamp"), "lamp"),
    **dict.fromkeys(("door key", "house key"), "key"),
    **dict.fromkeys(("acoustic guitar", "ukulele"), "guitar"),
    **dict.fromkeys(("rubber boot", "wellington boot", "wellington"), "boot"),
    **dict.fromkeys(("bunny", "bunny rabbit", "hare"), "rabbit"),
    **dict.fromkeys(("android", "toy robot"), "robot"),
}
COLOUR_SYNONYMS: Mapping[str, str] = {
    **dict.fromkeys(("crimson", "scarlet"), "red"),
    **dict.fromkeys(("emerald",), "green"),
    **dict.fromkeys(("navy", "azure", "cobalt"), "blue"),
    **dict.fromkeys(("golden", "gold"), "yellow"),
    **dict.fromkeys(("violet",), "purple"),
    **dict.fromkeys(("turquoise", "teal", "aqua"), "cyan"),
    **dict.fromkeys(("rose",), "pink"),
}
ADJECTIVES: Mapping[str, str] = {
    **dict.fromkeys(("striped", "stripy", "stripey"), "striped"),
    **dict.fromkeys(("spotted", "spotty", "dotted", "polka dotted"), "spotted"),
}
NOUNS: Mapping[str, str] = {
    **dict.fromkeys(("stripe", "stripes", "bands"), "striped"),
    **dict.fromkeys(
        ("spot", "spots", "dots", "polka dot", "polka dots", "dot"), "spotted"
    ),
}
VIEW_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("front",), "front"),
    **dict.fromkeys(("side", "left", "right"), "side"),
    **dict.fromkeys(("back", "rear", "behind"), "back"),
    **dict.fromkeys(("overhead", "top", "above", "bird s eye"), "overhead"),
}
NORMAL_MAP = ("normal map", "normals", "surface normals")
FILLERS = (
    *("a", "an", "the", "some", "one", "single", "of", "in", "and", "with", "on"),
    *("dslr", "photo", "photograph", "picture", "image", "render", "rendering"),
    *("rendered", "rendered image", "rendered photo", "3d", "3 d", "model", "toy"),
    *("high quality", "highest quality", "best quality", "quality", "high", "highly"),
    *("high resolution", "very", "ultra", "detailed", "intricate", "hq", "hd", "uhd"),
    *("4k", "8k", "hdr", "cgi", "blender", "octane", "unreal engine", "studio"),
    *("studio lighting", "professional", "realistic", "photorealistic", "masterpiece"),
    *("zoomed out", "close up", "wide angle", "isolated", "centered", "centred"),
    *("on a white background", "white background", "plain background"),
    *("cute", "beautiful", "nice", "simple", "small", "large", "big", "little"),
    *("colored", "coloured", "color", "colour", "from", "seen", "viewed", "view"),
    *("blurry", "ugly", "bad", "low quality", "low resolution", "worst quality"),
    *("noisy", "distorted", "deformed", "watermark", "text"),
)
"""Words without effect: how people ask for an image, not what is on it."""
RELATED: Mapping[str, tuple[str, ...]] = {
    words: names
    for group, names in (
        (
            "animal bear bird cat chicken cow deer dog dragon elephant fox frog horse "
            "lion monkey mouse panda penguin pig puppy kitten sheep swan tiger turtle "
            "zebra",
            ("rabbit", "duck", "fish"),
        ),
        (
            "apple banana bread burger hamburger cake cupcake carrot cherry food fruit "
            "lemon pear pineapple pizza strawberry sandwich tomato watermelon",
            ("ice cream cone", "mushroom", "sphere"),
        ),
        (
            "bicycle bike bus ferry helicopter motorcycle scooter ship submarine tank "
            "taxi tractor train truck van vehicle wagon",
            ("car", "sailboat", "airplane"),
        ),
        ("bed bench bookshelf couch sofa stool furniture", ("chair", "table", "lamp")),
        ("bottle bowl glass jar jug pan pot vase bucket", ("mug", "teapot")),
        ("barn building castle church tower lighthouse temple", ("house",)),
        ("banjo cello piano trumpet violin instrument", ("guitar",)),
        ("shoe sneaker sock slipper hat shirt glove", ("boot",)),
        ("bush cactus flower leaf palm plant tulip", ("tree", "mushroom")),
        ("man woman boy girl astronaut knight person human doll", ("robot", "snowman")),
        ("pyramid disc prism triangle", ("cone", "cube", "cylinder")),
        ("candle lantern torch bulb", ("lamp",)),
        ("lock hammer spoon sword tool wrench", ("key",)),
    )
    for words in group.split()
}
"""Common nouns that are not known, and the known objects nearest to them."""
