"""Teaching generator and decoder together, in pixels: what one step draws is to look like a drawing.

A flow's first step alone gives the mean of all that may be meant, and latents say nothing of which errors are seen. So
one step and the decoder learn from the picture they make: its pixels and edges, and its features in the eye (arXiv
1603.08155). An adversary of patches (arXiv 1611.07004) was tried: it made flat colours mottled, and was dropped.
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
from .autoencoder import LATENT_NOISE, feature_loss, over_colour, picture_loss, to_model_range
from .fusion_stage import Tables
from .generator_stage import START_NOISE, Starts, velocity_at
from .loop import Plan, device, run_stage, seeded
from .training_set import TrainingSet

FEATURE_WEIGHT = 2.0


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
    """Of a batch two thirds are drawn in one step, and half of those also from somewhere on the way to where it led.
    The rest is decoded from the encoder's latents, a little noisy, so that the decoder serves them too.
    """
    torch.manual_seed(0)
    starts = Starts(pictures, tables, network)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    nn.Module.to(eye, device())

    def loss_at(step: int) -> dict[str, Tensor]:
        generator = seeded(step)
        drawn, tokens, mean, wanted = starts.draw(step, plan.batch, generator)
        drawn_at_once, walked = len(mean) * 2 // 3, len(mean) // 3

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
        real = pictures.each(drawn.rows, to_model_range)
        colour = torch.rand(len(made), 3, 1, 1, generator=generator, device=mean.device)
        return {
            "flow": flow,
            "latents": 0.1 * F.mse_loss(one_step, wanted[:drawn_at_once]),
            "picture": picture_loss(made, real),
            "features": FEATURE_WEIGHT * feature_loss(eye, over_colour(made, colour), over_colour(real, colour)),
        }

    run_stage("finish", work, plan, nn.ModuleDict({"unet": unet, "decoder": vae.decoder}), loss_at)
    return unet, vae
