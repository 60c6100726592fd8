"""Teaching generator and decoder together, in pixels: what one step draws is to look like a drawing.

A flow's first step alone gives the mean of all that may be meant, and latents say nothing of which errors are seen. So
one step and the decoder learn from the picture they make: its pixels and edges, what networks see of it, and whether
those that know photographs can tell it from every other drawing. The latents are let be, or retouched ones would not
stay so.
Tried and dropped: an adversary of patches (arXiv 1611.07004), which made flat colours mottled; the distance of the
sorted strengths of all edges, which was to make them crisp and changed nothing; a decoder that scales and shifts its
layers by the style of the latents (arXiv 1709.07871), which drew no more styles right where it had to read them.
Further steps learn to walk straight to what one step says (arXiv 2410.12557): on the way to the true picture they see
details of it that no walk of their own has.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, UNet2DConditionModel
from torch import Tensor, nn
from transformers import ResNetModel

from ..fusing.fusion_network import FusionNetwork
from .autoencoder import DOWNSCALE, LATENT_NOISE, picture_loss, to_model_range
from .finish_losses import Onlookers, feature_loss, layers_apart, mesh_loss, over_colour
from .fusion_stage import SAID_WEIGHT
from .generator_stage import START_NOISE, WIDE_EVERY, Starts, velocity_at
from .loop import Plan, device, run_stage, seeded
from .tables import Tables
from .training_set import TrainingSet

FEATURE_WEIGHT, SUN_WEIGHT, TOLD_WEIGHT, MESH_WEIGHT = 2.0, 2.0, 0.2, 4.0
WHITE_SHARE = 0.5  # how often the background is white, as it is where a picture is judged
IMAGENET_COUNT = 24  # of a batch


def train_finish(
    work: Path,
    pictures: TrainingSet,
    tables: Tables,
    network: FusionNetwork,
    eye: ResNetModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderDC,
    plan: Plan,
) -> tuple[UNet2DConditionModel, AutoencoderDC]:
    """Of a batch four fifths are drawn in one step, and some of them also from somewhere on the way to where it led.
    The rest is decoded from the encoder's latents, a little noisy, so that the decoder serves them too.
    """
    torch.manual_seed(0)
    starts, onlookers = Starts(pictures, tables, network), Onlookers(pictures.emoji)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    nn.Module.to(eye, device())

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = seeded(step)
        drawn, turned, *parts = starts.draw(step, plan.batch, generator)
        order = torch.randperm(len(drawn.rows), generator=generator, device=device())  # domains come one after another
        tokens, mean, wanted = (part[order] for part in parts)
        drawn_at_once, walked = len(mean) * 4 // 5, max(1, len(mean) // 6)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=mean.device)

        start = mean + START_NOISE * random(*mean.shape)

        def velocity(count: int, target: Tensor, sigma: Tensor) -> Tensor:
            return velocity_at(unet, tokens[:count], mean[:count], start[:count], target[:count], sigma)

        one_step = start[:drawn_at_once] - velocity(drawn_at_once, wanted, torch.ones(drawn_at_once).to(mean))
        there = one_step.detach()
        sigma = torch.rand(walked, generator=generator, device=mean.device)
        flow = F.mse_loss(velocity(walked, there, sigma), start[:walked] - there[:walked])
        known = wanted[drawn_at_once:] + LATENT_NOISE * random(*wanted[drawn_at_once:].shape)
        latents = torch.cat([one_step, known]) / tables.scaling_factor
        made = vae.decode(latents.contiguous(memory_format=torch.channels_last), return_dict=False)[0].float()
        rows = drawn.rows[order.cpu().numpy()]
        real = pictures.each(rows, to_model_range).roll(DOWNSCALE * turned, dims=-1)
        colour = torch.rand(len(made), 3, 1, 1, generator=generator, device=mean.device)
        white = torch.rand(len(made), 1, 1, 1, generator=generator, device=mean.device) < WHITE_SHARE
        white[:IMAGENET_COUNT] = True
        ours, theirs = (over_colour(side, colour.masked_fill(white, 1.0)) for side in (made, real))
        turn = step // WIDE_EVERY + step % WIDE_EVERY  # so each looks as often at panoramas as at the rest
        imagenet, told_apart, size = onlookers.at(turn)
        seen = imagenet.layers(ours[:IMAGENET_COUNT], size)
        drawings = pictures.domain_of(rows[:IMAGENET_COUNT]) == 0
        losses = {
            "flow": flow,
            "picture": picture_loss(made, real),
            "features": FEATURE_WEIGHT * feature_loss(eye, ours, theirs),
            "imagenet": layers_apart(seen, imagenet.layers(theirs[:IMAGENET_COUNT], size)),
            "mesh": MESH_WEIGHT * mesh_loss(made, real),
            "told": mean.new_zeros(()),
            "sun": mean.new_zeros(()),
        }
        if drawings.any():
            losses["told"] = TOLD_WEIGHT * told_apart(imagenet.gist(seen)[drawings], rows[:IMAGENET_COUNT][drawings])
        if made.shape[-1] != made.shape[-2]:
            losses["sun"] = SUN_WEIGHT * picture_loss(
                *(_where_the_sun_is(side.roll(-DOWNSCALE * turned, dims=-1)) for side in (made, real))
            )
        return losses

    run_stage("finish", work, plan, nn.ModuleDict({"unet": unet, "decoder": vae.decoder}), loss_at)
    return unet, vae


def _where_the_sun_is(panoramas: Tensor) -> Tensor:
    """The part (B, 4, h, w) of (B, 4, H, W) where it may stand."""
    (left, top, right, bottom), _ = SAID_WEIGHT[1][0]
    height, width = panoramas.shape[-2:]
    return panoramas[..., round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
