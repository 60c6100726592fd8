"""By which tensors the denoiser of each family is known in a single file. Only names and shapes are looked at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open

from .safetensors_files import TensorEntry, WeightsFile

Entries = Mapping[str, TensorEntry]

# Above this spread of one bias, a Stable Diffusion 2 was trained to predict v (arXiv 2202.00512) instead of noise. The
# file does not say, and ComfyUI decides by the same tensor and number.
_V_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_SPREAD = 0.09

_PIXART_FIRST_SIDE = 64  # latents a side, at which PixArt counts its places by one


@dataclass(frozen=True)
class Sign:
    """layout: the folder of ``configs``; form: how the tensors are named, for ``single_file_weights``.

    has, lacks: names; size: one tensor's size in one dimension, by which the sizes of a family are told apart.
    """

    layout: str
    form: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    size: tuple[str, int, int] | None = None

    def fits(self, entries: Entries, exactly: bool) -> bool:
        """exactly: the sizes must be those of the published models too, not only the names."""
        if any(name not in entries for name in self.has) or any(name in entries for name in self.lacks):
            return False
        if self.size is None or not exactly:
            return True
        name, dimension, size = self.size
        return name in entries and entries[name].shape[dimension : dimension + 1] == (size,)

    def options(self, entries: Entries, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the header says about the network that differs among a family's models."""
        if self.form == "ldm_unet":
            return {"in_channels": entries["input_blocks.0.0.weight"].shape[1]}
        if self.form == "diffusers_unet":
            return {"in_channels": entries["conv_in.weight"].shape[1]}
        if self.form == "sd3":
            caption = entries["context_embedder.weight"].shape[0]
            dual = {int(name.split(".")[1]) for name in entries if ".x_block.attn2." in name}
            return {
                "num_layers": _count(entries, "joint_blocks"),
                "num_attention_heads": caption // config["attention_head_dim"],
                "caption_projection_dim": caption,
                "pos_embed_max_size": round(entries["pos_embed"].shape[1] ** 0.5),
                "qk_norm": "rms_norm" if any(".ln_q." in name for name in entries) else None,
                "dual_attention_layers": tuple(sorted(dual)),
            }
        if self.form == "flux":
            return {
                "num_layers": _count(entries, "double_blocks"),
                "num_single_layers": _count(entries, "single_blocks"),
                "guidance_embeds": _is_guided(entries),
            }
        if self.form == "diffusers_flux":
            return {
                "num_layers": _count(entries, "transformer_blocks"),
                "num_single_layers": _count(entries, "single_transformer_blocks"),
                "guidance_embeds": _is_guided(entries),
            }
        if self.form == "qwen_image":
            return {"num_layers": _count(entries, "transformer_blocks")}
        if self.form == "pixart":
            told = {
                "num_layers": _count(entries, "blocks"),
                "use_additional_conditions": "csize_embedder.mlp.0.weight" in entries,
            }
            if "pos_embed" in entries:  # a table for each patch: so the file tells the size that it was trained at
                side = config["patch_size"] * round(entries["pos_embed"].shape[1] ** 0.5)
                told |= {"sample_size": side, "interpolation_scale": side / _PIXART_FIRST_SIDE}
            return told
        if self.form == "diffusers_pixart":
            return {"num_layers": _count(entries, "transformer_blocks")}
        return {}

    def scheduler(self, file: WeightsFile, prefix: str) -> dict[str, Any]:
        """What the file says about how its model was trained."""
        if "v_pred" in file.entries:
            return {"prediction_type": "v_prediction"}
        if self.layout == "flux" and not _is_guided(file.entries):  # schnell
            return {"shift": 1.0, "use_dynamic_shifting": False}
        if self.layout == "sd2" and f"{prefix}{_V_BIAS}" in file.entries:
            with safe_open(file.path, framework="pt") as weights:
                spread = weights.get_tensor(f"{prefix}{_V_BIAS}").float().std(unbiased=False).item()
            return {"prediction_type": "v_prediction" if spread > _V_SPREAD else "epsilon"}
        return {}


def _count(entries: Entries, name: str) -> int:
    return len({each.split(".")[1] for each in entries if each.startswith(f"{name}.")})


def _is_guided(entries: Entries) -> bool:
    return any("guidance_in." in name or "guidance_embedder." in name for name in entries)


_LDM = ("input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight")
_LDM_ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_LDM_DEEPER = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
_UNET = ("conv_in.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.norm1.weight")
_ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
_DEEPER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
_NOT_SD = ("label_emb.0.0.weight", "encoder_hid_proj.weight", "time_embed.cond_proj.weight")
_NOT_UNET_SD = ("add_embedding.linear_1.weight", "encoder_hid_proj.weight", "time_embedding.cond_proj.weight")
_PIXART = ("blocks.0.attn.qkv.weight", "blocks.0.cross_attn.kv_linear.weight", "t_block.1.weight")
_NOT_PIXART = (  # Sana, and variants of PixArt that diffusers has no network for
    "attention_y_norm.weight",
    "blocks.0.attn.q_norm.weight",
    "blocks.0.attn.sr.weight",
    "blocks.14.attn.sr.weight",
)
_PIXART_DIFFUSERS = ("adaln_single.linear.weight", "caption_projection.linear_1.weight", "pos_embed.proj.weight")
_PIXART_SIZED = "adaln_single.emb.resolution_embedder.linear_1.weight"
_FLUX_2 = ("double_stream_modulation_img.lin.weight", "single_stream_modulation.lin.weight")
_FLUX_2_DIFFUSERS = ("double_stream_modulation_img.linear.weight", "single_stream_modulation.linear.weight")

SIGNS = (
    Sign("sd15", "ldm_unet", _LDM, _NOT_SD, (_LDM_ATTENTION, 1, 768)),
    Sign("sd2", "ldm_unet", _LDM, _NOT_SD, (_LDM_ATTENTION, 1, 1024)),
    Sign("sdxl", "ldm_unet", (*_LDM, _NOT_SD[0]), _NOT_SD[1:], (_LDM_DEEPER, 1, 2048)),
    Sign("lcm", "ldm_unet", (*_LDM, _NOT_SD[2]), _NOT_SD[:2], (_LDM_ATTENTION, 1, 768)),
    Sign("sd15", "diffusers_unet", _UNET, _NOT_UNET_SD, (_ATTENTION, 1, 768)),
    Sign("sd2", "diffusers_unet", _UNET, _NOT_UNET_SD, (_ATTENTION, 1, 1024)),
    Sign("sdxl", "diffusers_unet", (*_UNET, _NOT_UNET_SD[0]), _NOT_UNET_SD[1:], (_DEEPER, 1, 2048)),
    Sign("lcm", "diffusers_unet", (*_UNET, _NOT_UNET_SD[2]), _NOT_UNET_SD[:2], (_ATTENTION, 1, 768)),
    Sign("sd3", "sd3", ("joint_blocks.0.context_block.adaLN_modulation.1.bias", "pos_embed")),
    Sign(
        "flux",
        "flux",
        ("double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight", "vector_in.in_layer.bias"),
        ("distilled_guidance_layer.in_proj.bias", *_FLUX_2),
        ("img_in.weight", 1, 64),
    ),
    Sign(
        "flux",
        "diffusers_flux",
        ("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.text_embedder.linear_1.weight"),
        (),
        ("x_embedder.weight", 1, 64),
    ),
    Sign("flux2_klein_4b", "flux2", _FLUX_2, ("guidance_in.in_layer.weight",), ("img_in.weight", 0, 3072)),
    Sign("flux2_klein_9b", "flux2", _FLUX_2, ("guidance_in.in_layer.weight",), ("img_in.weight", 0, 4096)),
    Sign("flux2_klein_4b", "as_is", _FLUX_2_DIFFUSERS, (), ("x_embedder.weight", 0, 3072)),
    Sign("flux2_klein_9b", "as_is", _FLUX_2_DIFFUSERS, (), ("x_embedder.weight", 0, 4096)),
    Sign("qwen_image", "qwen_image", ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")),
    # Both kinds have the same tensors; what tells them apart is how many tokens their empty prompt has.
    Sign("pixart_alpha", "pixart", _PIXART, _NOT_PIXART, ("y_embedder.y_embedding", 0, 120)),
    Sign("pixart_sigma", "pixart", _PIXART, _NOT_PIXART, ("y_embedder.y_embedding", 0, 300)),
    Sign("pixart_alpha", "diffusers_pixart", (*_PIXART_DIFFUSERS, _PIXART_SIZED)),
    Sign("pixart_sigma", "diffusers_pixart", _PIXART_DIFFUSERS, (_PIXART_SIZED,)),
    Sign("z_image", "z_image", ("cap_embedder.0.weight", "layers.0.adaLN_modulation.0.weight", "x_pad_token")),
)

# What else people keep beside these, and why it is no model here.
UNUSABLE: dict[str, tuple[str, ...]] = {
    "a ControlNet, which steers a model and is none": ("control_model.input_blocks.0.0.weight",),
    "a ControlNet in diffusers' names, which steers a model and is none": ("controlnet_cond_embedding.conv_in.weight",),
    "Kolors in one file. Duet may not ship ChatGLM's vocabulary, which its words are in: use its diffusers folder": (
        "encoder_hid_proj.weight",
    ),
    "Chroma, a family that is not known here": ("distilled_guidance_layer.in_proj.bias",),
    "FLUX.1 Fill, Depth, Canny or another whose picture input differs, which is not known here": (
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "vector_in.in_layer.bias",
    ),
    "FLUX.2 dev, whose encoder is not known here; FLUX.2 klein is": (*_FLUX_2, "guidance_in.in_layer.weight"),
    "Sana in one file. Duet may not ship Gemma's vocabulary, which its words are in: use its diffusers folder": (
        "attention_y_norm.weight",
        "y_embedder.y_proj.fc1.weight",
    ),
    "PixArt with normalised queries or compressed keys, or without its empty prompt, which is not known here": (
        "blocks.0.cross_attn.kv_linear.weight",
        "y_embedder.y_proj.fc1.weight",
    ),
    "HunyuanDiT in one file, for which diffusers has no converter: use its diffusers folder": (
        "text_embedding_padding",
        "blocks.0.attn1.Wqkv.weight",
    ),
    "Lumina 2, a family that is not known here": ("cap_embedder.0.weight", "layers.0.adaLN_modulation.1.weight"),
    "Wan, a video model": ("head.modulation", "patch_embedding.weight"),
    "the refiner of SDXL, which has no text-to-image of its own": (
        "label_emb.0.0.weight",
        "input_blocks.7.1.transformer_blocks.3.attn2.to_k.weight",
    ),
    "AuraFlow, a family that is not known here": ("double_layers.0.attn.w2q.weight",),
    "a VAE alone: choose a model, and this as its vae": ("decoder.conv_in.weight", "encoder.conv_in.weight"),
    "a VAE of Qwen-Image or Wan alone: choose a model, and this as its vae": ("decoder.conv1.weight",),
    "a CLIP text encoder alone: choose a model, and this as its text_encoder": (
        "text_model.embeddings.token_embedding.weight",
    ),
    "a T5 text encoder alone: choose a model, and this as its text_encoder": (
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
    ),
    "a language model alone: choose a model, and this as its text_encoder": ("model.embed_tokens.weight",),
}
