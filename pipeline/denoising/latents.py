"""Between pictures and latents: seeded noise, encoding, decoding and a look at what is under way."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints import Checkpoint
from ..model_cache import ModelCache
from ..private_views import private_view
from ..residency import is_out_of_memory, place_of
from .panorama import continued, cut

log = logging.getLogger(__name__)

LARGEST_PREVIEW = 48  # latents a side
LARGEST_TILE, SMALLEST_TILE = 64, 16  # likewise


def seeds_of(seed: int | Sequence[int], count: int) -> Sequence[int]:
    """One for each picture: ``seed + i``, or ``seed[i]``."""
    seeds = [seed + number for number in range(count)] if isinstance(seed, int) else seed
    if len(seeds) != count:
        raise ValueError(f"expected a seed for each of {count} pictures, got {len(seeds)} seeds")
    return seeds


def generators(seed: int | Sequence[int], count: int) -> list[torch.Generator]:
    """One for each picture, see ``seeds_of``; on the CPU, so that every device draws the same."""
    return [torch.Generator("cpu").manual_seed(one % 2**64) for one in seeds_of(seed, count)]


def noise(shape: tuple[int, ...], sources: list[torch.Generator]) -> Tensor:
    """(B, *shape) of float32 on the CPU, one picture from each source."""
    return torch.stack([torch.randn(shape, generator=source) for source in sources])


def use_vae(cache: ModelCache, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
    """The decoder in the precision that it does not overflow in, float32 for some families."""
    if cache.residency.device.type != "cpu":
        dtype = dtype or checkpoint.family.vae_dtype
    return checkpoint.use(cache, "vae", dtype)


def channels_of(vae: Any) -> int:
    return vae.config.z_dim if "z_dim" in vae.config else vae.config.latent_channels


def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..1 -> (B, C, h, w), the most likely latents, scaled as the denoiser has them."""
    seen = (2 * pixels - 1).to(vae.device, vae.dtype)
    encoded = vae.encode(seen)
    return for_denoiser(vae, encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode())


def decode_latents(vae: Any, latents: Tensor, closes: bool = False) -> tuple[Tensor, Tensor]:
    """Latents, scaled as the denoiser has them -> RGB (B, 3, H, W) and alpha (B, 1, H, W) in 0..1.

    closes: a panorama, which is decoded continued at both ends. NaN where it overflows. A fourth channel is alpha, its
    colour premultiplied. (B, C, 1, h, w) is a film of one frame.
    """
    seen = continued(latents) if closes else latents
    decoded = vae.decode(for_decoder(vae, seen.to(*place_of(vae))), return_dict=False)[0]
    decoded = cut(decoded, decoded.shape[-1] // seen.shape[-1]) if closes else decoded
    decoded = decoded[:, :, 0] if decoded.ndim == 5 else decoded
    decoded = decoded.masked_fill(decoded.isinf(), torch.nan)  # clamped, it would pass for white or black
    values = ((decoded + 1) / 2).clamp(0, 1)
    if values.shape[1] == 3:
        return values, torch.ones_like(values[:, :1])
    alpha = values[:, 3:]
    return (values[:, :3] / alpha.clamp(min=1 / 255)).clamp(0, 1), alpha


def decode_or_tile(
    vae: Any, latents: Tensor, closes: bool = False, make_room: Callable[[], int] | None = None
) -> tuple[Tensor, Tensor, bool]:
    """``decode_latents`` to the CPU in float32. The last value says whether it was done in tiles.

    make_room: of a residency. Where memory runs out, it is done once more when other models have made way, then picture
    by picture, which changes nothing, then in tiles, which leave faint seams. None tries nothing further.
    """

    def ways() -> Iterator[tuple[Any, Sequence[Tensor], bool]]:
        yield vae, [latents], False
        if make_room is None:
            return
        if make_room():
            yield vae, [latents], False
        if len(latents) > 1:
            yield vae, latents.split(1), False
        if not getattr(vae, "use_tiling", True):
            yield in_tiles(vae, max(latents.shape[-2:])), latents.split(1), True

    said = ""
    for decoder, parts, tiled in ways():
        try:
            done = [tuple(side.float().cpu() for side in decode_latents(decoder, part, closes)) for part in parts]
            return torch.cat([pixels for pixels, _ in done]), torch.cat([alpha for _, alpha in done]), tiled
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error)
        # Out here, where the frames of the failed attempt are gone, and with them what it had decoded.
        log.warning("out of memory while decoding %d of %s", len(parts[0]), tuple(latents.shape[1:]))
    raise torch.OutOfMemoryError(said)


def in_tiles(vae: Any, side: int) -> Any:
    """A view of a VAE that works in tiles; the module, which others share, stays as it is. side: latents, the longer.

    Of itself, diffusers cuts only what is larger than the pictures that a VAE was trained on. Tiles are at most half
    as long as the side, which take a quarter of the memory, and no larger than a host's.
    """
    view = private_view(vae)
    if not hasattr(view, "use_tiling"):
        return view
    view.enable_tiling()
    if hasattr(view, "tile_latent_min_size"):  # others have tiles of 256 or 512 pixels, whatever they were trained on
        known = view.tile_latent_min_size
        tile = min(known, max(SMALLEST_TILE, min(LARGEST_TILE, side // 2)))
        view.tile_latent_min_size = tile
        view.tile_sample_min_size = tile * 2 ** (len(view.config.block_out_channels) - 1)
    return view


def preview(vae: Any, latents: Tensor) -> Tensor:
    """The first picture over white, RGB (3, h, w) in 0..1; of large latents a small one, since it is a look only."""
    first = latents[:1]
    largest = max(first.shape[-2:])
    if largest > LARGEST_PREVIEW:
        small = [max(1, round(side * LARGEST_PREVIEW / largest)) for side in first.shape[-2:]]
        film = first.ndim == 5
        first = (first.squeeze(2) if film else first).float().cpu()  # Apple's GPUs shrink by whole numbers only
        first = F.interpolate(first, size=small, mode="area")
        first = first.unsqueeze(2) if film else first
    pixels, alpha = decode_latents(vae, first)
    return (pixels * alpha + 1 - alpha)[0]


def for_denoiser(vae: Any, latents: Tensor) -> Tensor:
    """As the VAE gives and takes them, which is what a host's LATENT holds -> scaled as the denoiser has them."""
    mean, spread = _statistics(vae, latents)
    return (latents - mean) * (vae.config.get("scaling_factor") or 1.0) / spread


def for_decoder(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of ``for_denoiser``."""
    mean, spread = _statistics(vae, latents)
    return latents * spread / (vae.config.get("scaling_factor") or 1.0) + mean


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and spread that the latents were normalised by, besides the scaling factor; 0 or a shift, and 1."""
    mean, spread = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or spread is None:
        return vae.config.get("shift_factor") or 0.0, 1.0
    shape = (1, -1, *[1] * (latents.ndim - 2))
    return latents.new_tensor(mean).view(shape), latents.new_tensor(spread).view(shape)
