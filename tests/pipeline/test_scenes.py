"""Scenes that the small model learns: what their parameters say can be measured in the pictures."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from pipeline.mini.scenes.captions import LANGUAGES, phantom_caption, sky_caption
from pipeline.mini.scenes.phantoms import CONTRASTS, REGIONS, SIDES, SIZES, Insert, Phantom, inserts_in, render_phantom
from pipeline.mini.scenes.skies import PLACES, SEASONS, SUN_SEEN, WEATHERS, Sky, render_sky, seam_error, sun_height_in

HEIGHT = 64


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("weather", SUN_SEEN)
def test_the_sun_stands_where_it_is_said_to(place, weather):
    off = []
    for number, sun in enumerate((3, 40, 80)):
        sky = Sky(sun, 70 * number - 180, weather, SEASONS[number % 4], place)
        off.append(abs(sun_height_in(render_sky(sky, HEIGHT, generator(number))) - sun))
    assert max(off) < 8, off


def test_a_panorama_closes():
    seams = []
    for number, (place, weather) in enumerate(product(PLACES, WEATHERS)):
        picture = render_sky(Sky(30, 0, weather, SEASONS[number % 4], place), HEIGHT, generator(number))
        assert picture.shape == (HEIGHT, 2 * HEIGHT, 3)
        assert picture.dtype == np.float32
        assert 0 <= picture.min() < picture.max() <= 1
        seams.append(seam_error(picture))
    assert np.mean(seams) < 1.2
    cut = render_sky(Sky(30, 0, "clear", "summer", "mountains"), HEIGHT, generator())[:, :HEIGHT]
    assert seam_error(cut) > 1.5, "a part of a panorama does not close, and that must show"


@pytest.mark.parametrize("what", ["sun_height", "weather", "season", "place"])
def test_every_word_is_seen(what):
    sky = Sky(40, 0, "clear", "summer", "park")
    other = replace(sky, **{what: {"sun_height": 70, "weather": "foggy", "season": "autumn", "place": "sea"}[what]})
    assert np.abs(render_sky(sky, HEIGHT, generator()) - render_sky(other, HEIGHT, generator())).mean() > 0.005


def test_an_insert_is_found_on_its_side_and_nowhere_else():
    for number, (region, side, size, contrast) in enumerate(product(REGIONS, SIDES, SIZES, CONTRASTS)):
        phantom = Phantom(region, (Insert(side, size, contrast),))
        found = inserts_in(render_phantom(phantom, 128, generator(number)), region)
        other = SIDES[1 - SIDES.index(side)]
        assert found[side].area > 0 == found[other].area, phantom
        assert np.sign(found[side].contrast) == np.sign(CONTRASTS[contrast]), phantom


def test_sizes_and_contrasts_are_found_in_their_order():
    sizes, contrasts = list(SIZES), list(CONTRASTS)
    for number in range(60):
        draw = generator(number)
        (small, large), (dark, bright) = (sorted(draw.choice(3, 2, replace=False)) for _ in range(2))
        first, second = Insert("left", sizes[small], contrasts[bright]), Insert("right", sizes[large], contrasts[dark])
        region = REGIONS[number % 2]
        found = inserts_in(render_phantom(Phantom(region, (first, second)), 128, draw), region)
        assert found["left"].area < found["right"].area
        assert found["left"].contrast > found["right"].contrast


def test_a_plain_phantom_has_no_inserts():
    for number, region in enumerate(REGIONS * 3):
        found = inserts_in(render_phantom(Phantom(region, ()), 128, generator(number)), region)
        assert {each.area for each in found.values()} == {0.0}


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_say_what_is_drawn_in_many_ways(language):
    draw = generator()
    sky = Sky(20, 0, "clear", "winter", "city")
    skies = Counter(sky_caption(sky, language, draw) for _ in range(200))
    assert len(skies) > 20
    fog = {sky_caption(replace(sky, weather="foggy"), language, draw) for _ in range(50)}
    assert not any(word in caption for caption in fog for word in ("sun", "太阳")), "a sun that nobody sees"
    phantom = Phantom("head", (Insert("left", "large", "dark"), Insert("right", "small", "bright")))
    said = {phantom_caption(phantom, language, draw) for _ in range(200)}
    assert len(said) > 50
    left, right = {"en": ("left", "right"), "zh": ("左", "右")}[language]
    assert all(left in caption and right in caption for caption in said)


@pytest.mark.parametrize(("language", "low"), [("en", "low"), ("zh", "低")])
def test_a_word_names_one_height_of_the_sun_and_between_words_it_is_a_number(language: str, low: str):
    draw = generator()

    def said(height: float) -> list[str]:
        return [sky_caption(Sky(height, 0, "clear", "winter", "city"), language, draw) for _ in range(40)]

    assert any(low in caption for caption in said(22))
    assert all("30" in caption for caption in said(29))
    assert all(
        any(sign.isdecimal() for sign in caption.replace("360", "")) for caption in said(29) + said(11) + said(50)
    )


def test_the_same_seed_renders_the_same():
    sky = Sky(20, 0, "partly cloudy", "winter", "city")
    assert np.array_equal(render_sky(sky, HEIGHT, generator(5)), render_sky(sky, HEIGHT, generator(5)))
    assert not np.array_equal(render_sky(sky, HEIGHT, generator(5)), render_sky(sky, HEIGHT, generator(6)))
