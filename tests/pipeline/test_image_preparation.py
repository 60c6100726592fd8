"""Pictures made ready for an encoder: in range, framed, and the same alone as in a batch."""

import pytest
import torch
from torch import Tensor

from pipeline.finishing import finish_picture
from pipeline.image_preparation import prepare_image
from pipeline.vision.resizing import FITS, fit_to


def picture(low: float = 0.3, high: float = 1.0) -> Tensor:
    """(1, 3, 40, 24) that reaches exactly from low to high."""
    noise = torch.rand(1, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.amin()) / (noise.amax() - noise.amin())
    return low + (high - low) * noise


def prepared(pixels: Tensor, fit: str = "stretch") -> Tensor:
    return prepare_image(pixels, None, size=24, fit=fit).pixels


def test_an_error_of_rounding_changes_next_to_nothing():
    """Laid over white, the lightest places of a picture may come to a little more than 1."""
    for pixels in (picture(high=1 + 1e-6), picture(low=-1e-6, high=0.7)):
        torch.testing.assert_close(prepared(pixels), prepared(pixels.clamp(0, 1)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (picture(0, 255), picture(0, 1)),
        (picture(40, 200), picture(0.2, 1)),
        (picture(-1, 1), picture(0, 1)),
        (picture(-1, 0.5), picture(0, 0.75)),
        (picture(0.3, 0.6), picture(0.3, 0.6)),
    ],
)
def test_what_leaves_the_range_is_scaled_into_it(pixels: Tensor, expected: Tensor):
    torch.testing.assert_close(prepared(pixels), prepared(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("fit", FITS)
def test_a_picture_is_the_same_alone_as_in_a_batch(fit: str):
    """Each keeps within its own range, whatever reaches further beside it."""
    batch = torch.cat([picture(0.4, 0.6), picture(0, 1), picture(3, 7)])
    together = fit_to(batch, 17, 31, fit, fill=0.5)
    assert torch.equal(together, torch.cat([fit_to(one, 17, 31, fit, fill=0.5) for one in batch.split(1)]))
    assert together[0].amin() >= 0.4 and together[0].amax() <= 0.6


@pytest.mark.parametrize("shape", [(90, 9), (300, 4000), (7, 500)])
def test_of_a_thin_picture_only_what_stays_is_scaled(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    thin = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0)).cumsum(-1).cumsum(-2)
    cut = fit_to(thin / thin.amax(), 64, 48, "crop")
    monkeypatch.setattr("pipeline.vision.resizing._MOST_CUT", 1e9)
    whole = fit_to(thin / thin.amax(), 64, 48, "crop")
    assert cut.shape == whole.shape
    torch.testing.assert_close(cut, whole, atol=0.01, rtol=0)


def test_a_column_of_pixels_takes_no_more_memory_than_its_frame(monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []
    real = torch.nn.functional.interpolate

    def interpolate(*arguments, **options) -> Tensor:
        made.append((resized := real(*arguments, **options)).numel())
        return resized

    monkeypatch.setattr(torch.nn.functional, "interpolate", interpolate)
    assert fit_to(torch.rand(1, 3, 100_000, 1), 256, 256, "crop").shape == (1, 3, 256, 256)
    assert max(made) <= 10 * 3 * 256 * 256


def test_a_side_that_follows_from_the_other_is_bounded_too():
    with pytest.raises(ValueError, match=r"at most 16384, but pictures of 4x4096 kept in proportion.*8192x8388608"):
        finish_picture(torch.rand(1, 3, 4096, 4), None, width=8192)
