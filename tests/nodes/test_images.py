"""IMAGE and MASK to pixels and opacity, and back. The file is loaded alone: its package imports the host."""

import importlib.util
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[2] / "nodes" / "images.py"


@pytest.fixture(scope="module")
def images():
    spec = importlib.util.spec_from_file_location("duet_images", SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, 5, 7, channels, generator=torch.Generator().manual_seed(batch + channels))


@pytest.mark.parametrize("batch", [1, 3])
def test_rgb_goes_there_and_back(images, batch: int):
    image = picture(batch)
    pixels, opacity = images.to_pixels(image)
    assert (pixels.shape, opacity) == ((batch, 3, 5, 7), None)
    assert torch.equal(images.to_image(pixels), image)
    assert images.to_image(pixels).is_contiguous()


def test_grey_becomes_three_equal_channels(images):
    image = picture(channels=1)
    pixels, _ = images.to_pixels(image)
    assert torch.equal(pixels, image.movedim(-1, 1).expand(-1, 3, -1, -1))


def test_a_mask_is_one_where_transparent(images):
    mask = torch.zeros(1, 5, 7)
    mask[:, 0] = 1
    _, opacity = images.to_pixels(picture(), mask)
    assert opacity[0, 0].eq(0).all() and opacity[0, 1:].eq(1).all()
    assert torch.equal(images.to_mask(opacity), mask)
    assert torch.equal(images.to_mask(opacity.unsqueeze(1)), mask)


def test_the_empty_mask_of_load_image_means_nothing_is_transparent(images):
    assert images.to_pixels(picture(), torch.zeros(1, 64, 64))[1] is None


def test_alpha_and_the_same_mask_are_not_counted_twice(images):
    image = picture(channels=4)
    pixels, opacity = images.to_pixels(image, 1 - image[..., 3])
    assert pixels.shape == (2, 3, 5, 7)
    torch.testing.assert_close(opacity, image[..., 3])


def test_colours_survive_being_laid_over_white(images):
    pixels = torch.rand(2, 3, 5, 7)
    alpha = torch.linspace(0.02, 1, 70).reshape(2, 1, 5, 7)
    image = images.to_image(images.over_white(pixels, alpha))
    straight, opacity = images.to_pixels(image, images.to_mask(alpha), lies_over_white=True)
    torch.testing.assert_close(straight, pixels, atol=1e-4, rtol=0)
    torch.testing.assert_close(opacity, alpha[:, 0])


def test_what_is_wholly_transparent_is_white(images):
    nothing = torch.zeros(1, 1, 5, 7)
    assert images.over_white(torch.rand(1, 3, 5, 7), nothing).eq(1).all()
    assert images.from_over_white(torch.ones(1, 3, 5, 7), nothing).eq(1).all()


def test_an_rgba_picture_is_straight_already(images):
    image = picture(channels=4)
    assert torch.equal(images.to_pixels(image, lies_over_white=True)[0], image[..., :3].movedim(-1, 1))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_mask_goes_where_the_picture_is(images, channels: int):
    """A host that keeps pictures on a GPU has Load Image's masks on the CPU still."""
    image = picture(channels=channels).to("meta")
    _, opacity = images.to_pixels(image, torch.ones(1, 5, 7))
    assert opacity.device == image.device


@pytest.mark.parametrize(
    ("image", "mask", "named"),
    [
        (torch.rand(5, 7, 3), None, "(5, 7, 3)"),
        (torch.rand(1, 5, 7, 2), None, "(1, 5, 7, 2)"),
        (torch.rand(1, 5, 7, 3), torch.ones(1, 1, 5, 7), "(1, 1, 5, 7)"),
        (torch.rand(3, 5, 7, 4), torch.ones(2, 5, 7), "3 of 7x5"),
        (torch.rand(1, 5, 7, 4), torch.ones(1, 6, 7), "1 of 7x6"),
    ],
)
def test_a_wrong_shape_is_refused_by_name(images, image: torch.Tensor, mask: torch.Tensor | None, named: str):
    with pytest.raises(ValueError, match="expected") as refusal:
        images.to_pixels(image, mask)
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "colour"),
    [("#ffffff", (1, 1, 1)), ("black", (0, 0, 0)), (" #F00 ", (1, 0, 0)), ("Transparent", None)],
)
def test_colours_are_read_as_css_writes_them(images, text: str, colour: tuple | None):
    assert images.to_colour(text) == colour


@pytest.mark.parametrize("text", ["", "#12", "no such colour", "#" * 5000])
def test_an_unknown_colour_is_refused(images, text: str):
    with pytest.raises(ValueError, match="transparent"):
        images.to_colour(text)


def test_a_preview_is_rgb(images):
    shown = images.to_pil(torch.tensor([0.0, 0.5, 2.0]).reshape(3, 1, 1).expand(3, 4, 6))
    assert (shown.mode, shown.size, shown.getpixel((0, 0))) == ("RGB", (6, 4), (0, 128, 255))
