"""PSNR and SSIM are those of scikit-image, and what is worked out by hand."""

import math
from typing import Any

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pipeline.acceleration.measuring import psnr, ssim


def pictures(count: int = 2, channels: int = 3, height: int = 40, width: int = 57, seed: int = 0) -> torch.Tensor:
    """Smooth ones with some noise, as pictures are: (B, C, H, W) in 0..1."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 6, 6, generator=source)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=source)).clamp(0, 1)


def spoilt(clean: torch.Tensor, noise: float) -> torch.Tensor:
    source = torch.Generator().manual_seed(7)
    return (clean + noise * torch.randn(clean.shape, generator=source)).clamp(0, 1)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("noise", [0.001, 0.05, 0.5])
def test_they_are_those_of_scikit_image(channels: int, noise: float):
    one = pictures(channels=channels)
    other = spoilt(one, noise)
    measured, alike = psnr(one, other), ssim(one, other)
    for number, (a, b) in enumerate(zip(one.double().numpy(), other.double().numpy(), strict=True)):
        assert measured.each[number] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-9)
        wanted = structural_similarity(
            a, b, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert alike.each[number] == pytest.approx(wanted, abs=1e-9)
    assert alike.mean == pytest.approx(sum(alike.each) / 2)


def test_numbers_worked_out_by_hand():
    black, grey, white = (torch.full((1, 3, 16, 16), value) for value in (0.0, 0.1, 1.0))
    assert psnr(black, grey).mean == pytest.approx(20, abs=1e-5)  # 10 log10(1 / 0.1^2)
    assert psnr(black, white).mean == pytest.approx(0, abs=1e-9)
    # Without variance only the means count: (2 m n + C1) / (m^2 + n^2 + C1).
    assert ssim(grey, white).mean == pytest.approx((0.2 + 1e-4) / (1.01 + 1e-4), abs=1e-6)
    assert ssim(black, white).mean == pytest.approx(1e-4 / (1 + 1e-4), abs=1e-9)


def test_equal_pictures_are_as_near_as_can_be():
    one = pictures()
    assert psnr(one, one.clone()).each == (math.inf, math.inf) and psnr(one, one.clone()).mean == math.inf
    assert ssim(one, one.clone()).each == pytest.approx((1, 1), abs=1e-12)


def test_the_mean_is_that_of_the_error():
    """0 of one picture and 0.02 of the other are 0.01 in the mean, which is 20 dB."""
    one = torch.zeros(2, 3, 16, 16)
    other = one.clone()
    other[1] += math.sqrt(0.02)
    measured = psnr(one, other)
    assert measured.each[0] == math.inf and measured.each[1] == pytest.approx(-10 * math.log10(0.02), abs=1e-4)
    assert measured.mean == pytest.approx(20, abs=1e-4)


def test_more_noise_is_less_alike_and_the_sides_may_change_places():
    one = pictures()
    noises = [0.01, 0.05, 0.2]
    assert [psnr(one, spoilt(one, noise)).mean for noise in noises] == sorted(
        (psnr(one, spoilt(one, noise)).mean for noise in noises), reverse=True
    )
    alike = [ssim(one, spoilt(one, noise)).mean for noise in noises]
    assert alike == sorted(alike, reverse=True) and len(set(alike)) == 3
    assert ssim(spoilt(one, 0.1), one).mean == pytest.approx(ssim(one, spoilt(one, 0.1)).mean, abs=1e-12)


def test_half_precision_is_taken():
    one = pictures().half()
    other = spoilt(one.float(), 0.05).half()
    assert psnr(one, other).mean == pytest.approx(psnr(one.float(), other.float()).mean)
    assert ssim(one.bfloat16(), other.bfloat16()).mean < 1


SIZE = (1, 3, 16, 16)


@pytest.mark.parametrize("measure", [psnr, ssim])
@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (torch.zeros(SIZE), torch.zeros(1, 3, 16, 17), r"one shape .* \(1, 3, 16, 16\) and \(1, 3, 16, 17\)"),
        (torch.zeros(SIZE), torch.zeros(2, 3, 16, 16), "one shape"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"\(B, C, H, W\)"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), r"\(B, C, H, W\)"),
        (torch.zeros(SIZE), torch.full(SIZE, 255.0), "expected pictures in 0..1, got values from 255 to 255"),
        (torch.full(SIZE, -0.5), torch.zeros(SIZE), "expected pictures in 0..1, got values from -0.5"),
        (torch.full(SIZE, math.nan), torch.zeros(SIZE), "expected pictures in 0..1, got values from nan"),
    ],
)
def test_what_cannot_be_compared_is_refused(measure: Any, one: torch.Tensor, other: torch.Tensor, said: str):
    with pytest.raises(ValueError, match=said):
        measure(one, other)


def test_a_picture_smaller_than_the_window_is_refused():
    small = torch.zeros(1, 3, 10, 40)
    with pytest.raises(ValueError, match=r"at least 11 x 11 pixels, got \(1, 3, 10, 40\)"):
        ssim(small, small)
    assert psnr(small, small).mean == math.inf
