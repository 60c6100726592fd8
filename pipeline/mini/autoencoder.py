"""The small model's autoencoder: RGBA of any size, trained at 128 pixels <-> 16 channels on a grid of an eighth."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from ..denoising.panorama import continued, cut
from .loop import Plan, device, run_stage, seeded
from .training_set import TrainingSet, counts_of

DOWNSCALE = 8  # pixels a side of one latent
DECODER_LAYERS = (3, 3, 2, 2)  # finest first: there are few weights in a layer there, and all that a style is seen by
LATENT_NOISE = 0.15  # relative; the decoder must forgive what the fusion network gets slightly wrong


def new_autoencoder() -> AutoencoderDC:
    """A deep-compression autoencoder (arXiv 2410.10733) without attention: its residual shortcuts learn in minutes."""
    channels = (16, 32, 64, 128)
    return AutoencoderDC(
        in_channels=4,
        latent_channels=16,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=DECODER_LAYERS,
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def deepened(vae: AutoencoderDC) -> AutoencoderDC:
    """The same autoencoder with the decoder's DECODER_LAYERS; a further one adds nothing until it has learned."""
    if tuple(vae.config["decoder_layers_per_block"]) == DECODER_LAYERS:
        return vae
    deeper = AutoencoderDC.from_config({**vae.config, "decoder_layers_per_block": DECODER_LAYERS})
    assert isinstance(deeper, AutoencoderDC)
    had, state = vae.state_dict(), deeper.state_dict()
    for name in state.keys() - had.keys():
        if name.endswith(("norm.weight", "norm.bias")):  # the last that a residual layer does
            state[name] = torch.zeros_like(state[name])
    deeper.load_state_dict(state | had)
    return deeper.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def to_model_range(pixels: Tensor) -> Tensor:
    """(B, H, W, 4) uint8 -> (B, 4, H, W) float in -1..1, channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def picture_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """L1 on values and on edges, both (B, 4, H, W)."""
    across = (made.diff(dim=-1) - wanted.diff(dim=-1)).abs().mean()
    down = (made.diff(dim=-2) - wanted.diff(dim=-2)).abs().mean()
    return (made - wanted).abs().mean() + across + down


def train_autoencoder(work: Path, pictures: TrainingSet, vae: AutoencoderDC, plan: Plan) -> AutoencoderDC:
    torch.manual_seed(0)
    rows, counts = pictures.training_rows(), counts_of(plan.batch)

    def loss_at(step: int) -> dict[str, Tensor]:
        pick, generator = np.random.default_rng(step), seeded(step)
        apart: list[Tensor] = []
        sizes: list[Tensor] = []
        for some, count in zip(rows, counts, strict=True):
            pixels = pictures.pixels_of(np.sort(pick.choice(some, count, replace=False)))
            wanted = _varied(to_model_range(pixels), pick).contiguous(memory_format=torch.channels_last)
            latents = _encode(vae, wanted)
            noise = torch.randn(latents.shape, generator=generator, device=latents.device)
            made = vae.decode(latents + LATENT_NOISE * latents.detach().std() * noise, return_dict=False)[0]
            apart.append(picture_loss(made.float(), wanted) * count / plan.batch)
            sizes.append(latents.float().square().mean() * count / plan.batch)
        return {"picture": torch.stack(apart).sum(), "size": 1e-4 * torch.stack(sizes).sum()}

    run_stage("autoencoder", work, plan, nn.ModuleDict({"vae": vae}), loss_at)
    return vae


def _varied(pictures: Tensor, pick: np.random.Generator) -> Tensor:
    """Mirrored half of the time; a panorama, which closes, also turned."""
    if pictures.shape[-1] != pictures.shape[-2]:
        pictures = pictures.roll(int(pick.integers(pictures.shape[-1])), dims=-1)
    return pictures.flip(-1) if pick.random() < 0.5 else pictures


@torch.no_grad()
def encode_pictures(vae: AutoencoderDC, pixels: Tensor, closes: bool = False) -> Tensor:
    """(N, H, W, 4) uint8 -> latents (N, 16, H/8, W/8), unscaled. closes: panoramas, whose ends are each other's."""
    found = []
    for chunk in pixels.split(32):
        wanted = to_model_range(chunk).to(device())
        found.append(cut(_encode(vae, continued(wanted, DOWNSCALE))) if closes else _encode(vae, wanted))
    return torch.cat(found)


def _encode(vae: AutoencoderDC, pixels: Tensor) -> Tensor:
    return vae.encode(pixels, return_dict=False)[0]  # pyright: ignore[reportReturnType]
