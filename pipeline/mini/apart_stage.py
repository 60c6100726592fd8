"""Telling apart: what is still taken for another style's is moved once more, and remembered.

Retouching brings what is drawn nearer to a drawing, whatever it is to be told from. Here two ImageNet networks have to
find it likelier than its concept in all other styles, by so much and no more; beside it the picture's own error counts
most, or what pleases these networks would speckle it. So go, of all styles, the drawings that are most taken for
another's; what is remembered of the others stays.
"""

import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, UNet2DConditionModel
from torch import Tensor, nn

from ..fusing.fusion_network import FusionNetwork
from .finish_losses import NEAR, LineUp
from .loop import Plan, device
from .remembering import remember, remembered
from .retouch_stage import Aim, Retoucher, keep_values
from .tables import Tables
from .training_set import TrainingSet

logger = logging.getLogger(__name__)

A_ROUND = 1536  # drawings that are moved, about a third of those that are remembered
MOST = 4673  # drawings to remember: with their neighbours six megabytes, which is what the other parts leave of sixty


def _ahead(line_up: LineUp, gists: Tensor, rows: np.ndarray) -> Tensor:
    """Of the other styles by three times what makes one e times as likely; to be further ahead is worth nothing."""
    return 3 * F.softplus(line_up.behind(gists, rows) / NEAR + 3).mean()


TOLD_APART = Aim(steps=4, pace=0.7, picture=6.0, layers=3.0, told=_ahead)


def train_apart(
    work: Path,
    pictures: TrainingSet,
    tables: Tables,
    network: FusionNetwork,
    unet: UNet2DConditionModel,
    vae: AutoencoderDC,
    plan: Plan,
) -> FusionNetwork:
    """Of the plan: so many rounds, drawings at once, and how far a step goes, of latents of unit variance.

    All but the memory stays as it is.
    """
    nn.Module.to(network, device()).eval().requires_grad_(False)
    hand = Retoucher(pictures, tables, network, unet, vae, TOLD_APART)
    for number in range(1, plan.steps + 1):
        folder = work / f"apart-{number}"
        known = remembered(network, pictures, tables)
        if not (folder / "rows.pt").exists():
            chosen = most_taken(hand, pictures.emoji.training_rows(), known, plan.batch)
            keep_values(folder / "rows.pt", torch.from_numpy(chosen))
        rows = torch.load(folder / "rows.pt", weights_only=True).numpy()
        moves, every = hand.moved(folder, rows, plan), np.union1d(known, rows)
        of_all = moves.new_zeros(len(every), *moves.shape[1:])
        of_all[torch.from_numpy(np.searchsorted(every, rows)).to(moves.device)] = moves
        share = remember(network, pictures, tables, every, of_all)
        logger.info(
            "apart %d/%d: of %d drawings moves of %.4f, made %.2f",
            number, plan.steps, len(rows), moves.square().mean(), share,
        )  # fmt: skip
    return network


def most_taken(hand: Retoucher, learned: np.ndarray, known: np.ndarray, batch: int) -> np.ndarray:
    """In rising order, A_ROUND of those that are remembered and of as many others as there is room for."""
    room = max(0, MOST - len(known))
    asked = learned if room else known
    asked = asked[np.argsort(-hand.behind(asked, batch), kind="stable")]
    is_known = np.isin(asked, known)
    return np.sort(asked[is_known | (np.cumsum(~is_known) <= room)][:A_ROUND])
