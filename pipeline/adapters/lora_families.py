"""For which family of models a LoRA was made, told by its names and sizes."""

import re
from dataclasses import dataclass

from .lora_files import DOWN, Shapes, gathered, stand_ins

_UNET, _FLUX, _FLUX2, _SD3 = (
    "UNet2DConditionModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "SD3Transformer2DModel",
)
_IN_ONE_ROW = frozenset(
    {"HunyuanDiT2DModel", "PixArtTransformer2DModel", "SanaTransformer2DModel", "Transformer2DModel"}
)
UNETS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}


@dataclass(frozen=True)
class MadeFor:
    """name: of the family; denoisers: classes it may be of; width: of the words its cross-attention hears, if told."""

    name: str
    denoisers: frozenset[str]
    width: int | None = None


def made_for(shapes: Shapes) -> MadeFor | None:
    """Told by names, and by widths where the names are those of several families; None where neither tells."""
    shapes = {name: tuple(part.shape) for name, part in gathered(stand_ins(shapes))[0].items()}
    names = [key.replace(".", "_") for key in shapes]

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if has("noise_refiner", "context_refiner"):
        return MadeFor("Z-Image", frozenset({"ZImageTransformer2DModel"}))
    if has("down_blocks_", "up_blocks_", "mid_block_", "input_blocks_", "output_blocks_", "middle_block_"):
        width = next((shape[1] for key, shape in shapes.items() if _hears_words(key, shape)), None)
        return MadeFor(UNETS.get(width or 0, "Stable Diffusion"), frozenset({_UNET}), width)
    if has("img_mlp_net", "txt_mlp_net", "img_mod_1"):
        return MadeFor("Qwen-Image", frozenset({"QwenImageTransformer2DModel"}))
    if has("joint_blocks_"):
        return MadeFor("Stable Diffusion 3", frozenset({_SD3}))
    if has("stream_modulation", "to_qkv_mlp_proj", "ff_linear_in"):
        return MadeFor("FLUX.2", frozenset({_FLUX2}))
    if has("double_blocks_", "single_blocks_"):
        return _flux_by_width(shapes)
    if has("single_transformer_blocks_"):
        if has("proj_mlp", "norm1_linear", "ff_net"):
            return MadeFor("FLUX.1", frozenset({_FLUX}))
        return MadeFor("FLUX", frozenset({_FLUX, _FLUX2}))
    if has("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        joint = frozenset({_FLUX, _FLUX2, _SD3, "QwenImageTransformer2DModel"})
        return MadeFor("FLUX, Qwen-Image or Stable Diffusion 3", joint)
    if has("blocks_0_attn2"):
        if has("blocks_0_attn_"):  # beside which the others have attn1
            return MadeFor("Stable Diffusion 3", frozenset({_SD3}))
        return MadeFor("Sana, PixArt or HunyuanDiT", _IN_ONE_ROW)
    return None


def _hears_words(key: str, shape: tuple[int, ...]) -> bool:
    return bool(re.search(r"attn2[._](processor[._])?to_[kv]", key)) and key.endswith(DOWN) and len(shape) > 1


def _flux_by_width(shapes: Shapes) -> MadeFor:
    """The gated layers of FLUX.2 are 6 and 9 times as wide as what enters them, where FLUX.1's are 4 and 7 times."""
    for key, shape in shapes.items():
        if re.search(r"(img_mlp[._]0|linear1)\.", key) and key.endswith(DOWN):
            up = shapes.get(key.replace("lora_down", "lora_up").replace("lora_A", "lora_B"), shape)
            gated = up[0] in (6 * shape[1], 9 * shape[1])
            return MadeFor("FLUX.2", frozenset({_FLUX2})) if gated else MadeFor("FLUX.1", frozenset({_FLUX}))
    return MadeFor("FLUX", frozenset({_FLUX, _FLUX2}))
