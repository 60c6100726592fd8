"""Pictures made ready for an encoder: in range, framed, and the same alone as in a batch."""

import pytest
import torch
from torch import Tensor

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
