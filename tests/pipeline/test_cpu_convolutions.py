"""Convolutions for a CPU: the same numbers, from the same parameters, with nothing changed in the shared module."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from pipeline.acceleration import cpu_convolutions
from pipeline.acceleration.cpu_convolutions import SUMMED, doubled_convolution, fitted_to_cpu, quarters

OPTIONS: list[dict[str, Any]] = [
    {"stride": 2, "padding": 1},
    {"padding": 0},
    {"dilation": 2, "padding": 2},
    {"bias": False},
]


def assert_alike(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_doubling_then_convolving_is_four_small_convolutions(size: tuple[int, int], batch: int):
    convolution = nn.Conv2d(5, 6, 3, padding=1)
    pixels = torch.randn(batch, 5, *size)
    expected = convolution(F.interpolate(pixels, scale_factor=2.0, mode="nearest"))
    assert_alike(doubled_convolution(pixels, quarters(convolution.weight), convolution.bias), expected)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the convolutions of a tiny model count as large."""
    monkeypatch.setattr(cpu_convolutions, "_FEWEST_WEIGHTS", 256)
    monkeypatch.setattr(cpu_convolutions, "_FEWEST_DOUBLED", 256)
    monkeypatch.setattr(cpu_convolutions, "_FEWEST_PIXELS", 4)


def unet() -> Any:
    torch.manual_seed(0)
    made: Any = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=8,
        layers_per_block=1,
    )  # fmt: skip
    return made.eval()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("side", [6, 16])
def test_a_unet_says_the_same(small_limits: None, batch: int, side: int):
    plain = unet()
    view = fitted_to_cpu(plain)
    kinds = {type(part).__name__ for part in view.modules()}
    assert {"_GatheringConv2d", "DoublingUpsample2D"} <= kinds
    told = torch.randn(batch, 4, side, side), torch.tensor(500), torch.randn(batch, 7, 32)
    with torch.inference_mode():
        for _ in range(2):  # the second time with weights that were added up before
            assert_alike(view(*told).sample, plain(*told).sample)
    assert any(SUMMED in vars(part) for part in view.modules())
    assert not any(SUMMED in vars(part) for part in plain.modules())
    assert {id(each) for each in view.parameters()} == {id(each) for each in plain.parameters()}


def test_a_decoder_says_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_convolutions, "_FEWEST_DOUBLED", 256)
    monkeypatch.setattr(cpu_convolutions, "_FEWEST_PIXELS", 4)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (32, 64),
    }
    plain: Any = AutoencoderKL(**sizes, latent_channels=4)
    plain.eval()
    view = fitted_to_cpu(plain)
    assert view is not plain and view.encoder is plain.encoder, "what is not changed is shared as it is"
    latents = torch.randn(1, 4, 5, 6)
    with torch.inference_mode():
        assert_alike(view.decode(latents).sample, plain.decode(latents).sample)


def test_strides_are_kept(small_limits: None):
    for options in OPTIONS:
        plain = nn.Sequential(nn.Conv2d(8, 8, 3, **options))
        view, pixels = fitted_to_cpu(plain), torch.randn(3, 8, 6, 5)
        assert type(view[0]).__name__ == "_GatheringConv2d"
        assert_alike(view(pixels), plain(pixels))


def test_a_hook_on_the_convolution_is_heard(small_limits: None):
    plain: Any = nn.Sequential(Upsample2D(8, use_conv=True))
    view, pixels = fitted_to_cpu(plain), torch.randn(1, 8, 4, 4)
    expected = 2 * plain(pixels)
    plain[0].conv.register_forward_hook(lambda module, given, made: 2 * made)
    assert_alike(fitted_to_cpu(plain)(pixels), expected)
    assert_alike(view[0](pixels, (7, 8)), plain[0](pixels, (7, 8)))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, padding_mode="circular", padding=1),
        nn.Conv2d(8, 8, 3).half(),
        nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last),
        nn.Conv1d(8, 8, 3),
        nn.Conv2d(8, 8, 3, device="meta"),
    ],
    ids=["groups", "circular", "half", "channels_last", "one dimension", "no CPU"],
)
def test_others_stay_as_they_are(small_limits: None, layer: nn.Module):
    model = nn.Sequential(layer)
    assert fitted_to_cpu(model) is model


def test_a_model_that_has_nothing_to_fit_is_walked_through_once(monkeypatch: pytest.MonkeyPatch):
    plain = unet()
    assert fitted_to_cpu(plain) is plain
    with monkeypatch.context() as patched:
        patched.setattr(cpu_convolutions, "_fitted", lambda *_: pytest.fail("expected no second walk"))
        assert fitted_to_cpu(plain) is plain
    assert fitted_to_cpu(unet()) is not plain
