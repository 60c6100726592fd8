"""PixArt's denoiser from its makers' names to those of diffusers, which has no converter for it."""

import re

import torch

Tensors = dict[str, torch.Tensor]

_RENAMED = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}
_RENAMED_IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "scale_shift_table": "scale_shift_table",
}
# One matrix for several, one above the other.
_SPLIT_IN_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}


def to_diffusers(tensors: Tensors) -> Tensors:
    """Leaves out what diffusers computes (``pos_embed``) or asks the text encoder for (the empty prompt)."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        stem, dot, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            stem, dot, kind = name, "", ""
        if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", stem):
            start, part = f"transformer_blocks.{block[1]}", block[2]
            if part in _SPLIT_IN_BLOCK:
                ways = _SPLIT_IN_BLOCK[part]
                pieces = zip(ways, tensor.chunk(len(ways)), strict=True)
                found |= {f"{start}.{way}{dot}{kind}": piece.contiguous() for way, piece in pieces}
            elif part in _RENAMED_IN_BLOCK:
                found[f"{start}.{_RENAMED_IN_BLOCK[part]}{dot}{kind}"] = tensor
        elif stem in _RENAMED:
            found[f"{_RENAMED[stem]}{dot}{kind}"] = tensor
    return found
