"""The layouts of single files, written from diffusers' components: the inverse of what the loader converts."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def ldm_unet(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Blocks are counted through in CompVis' layout, a down- or upsampler being one of its own, or the end of one."""
    layers = config["layers_per_block"]
    attended = {name.split(".attentions")[0] for name in tensors if ".attentions." in name}

    def renamed(name: str) -> str:
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            way, block, kind, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            first = block * (layers + 1) + (way == "down")
            place = {"down": "input_blocks", "up": "output_blocks"}[way]
            if kind == "downsamplers":
                return f"{place}.{first + layers}.0.op.{rest.removeprefix('conv.')}"
            if kind == "upsamplers":
                return f"{place}.{first + layers}.{2 if f'up_blocks.{block}' in attended else 1}.{rest}"
            return (
                f"{place}.{first + number}.{int(kind == 'attentions')}.{_resnet(rest) if kind == 'resnets' else rest}"
            )
        for new, old in _UNET_ENDS.items():
            if name.startswith(f"{new}."):
                rest = name.removeprefix(f"{new}.")
                return f"{old}.{_resnet(rest) if 'resnets' in new else rest}"
        raise KeyError(name)

    return {renamed(name): tensor for name, tensor in tensors.items()}


def _resnet(rest: str) -> str:
    part, kind = rest.rsplit(".", 1)
    return f"{_RESNET[part]}.{kind}"


def ldm_vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    blocks = len(config["block_out_channels"])
    names = {
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "mid_block.attentions.0.to_": "mid.attn_1.",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        ".resnets.": ".block.",
    }
    written = {}
    for name, tensor in tensors.items():
        attention = "attentions" in name and name.endswith("weight") and "group_norm" not in name
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)
        for new, old in names.items():
            name = name.replace(new, old)
        written[name] = tensor[:, :, None, None] if attention else tensor
    return written


def clip(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return {_with_wrapper(name): tensor for name, tensor in tensors.items()}


def _with_wrapper(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def open_clip(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Query, key and value in one; the projection the other way round."""
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.": "ln_final.",
        "text_model.encoder.layers.": "transformer.resblocks.",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
    }
    tensors = clip(tensors, config)
    written = {
        "text_projection": tensors.pop("text_projection.weight", torch.eye(config["hidden_size"])).T.contiguous()
    }
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            three = [tensors[name.replace(".q_proj.", f".{which}_proj.")] for which in "qkv"]
            name, tensor = re.sub(r"\.q_proj\.(\w+)", r".in_proj_\1", name), torch.cat(three)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for new, old in names.items():
            name = name.replace(new, old)
        written[name] = tensor
    return written


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def sd3(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    ends = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    within = {
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    fused = {
        ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
        ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
    }
    last = f"transformer_blocks.{config['num_layers'] - 1}.norm1_context."
    tensors = {
        name: _swapped(tensor) if name.startswith(("norm_out.", last)) else tensor for name, tensor in tensors.items()
    }
    written = {"pos_embed": tensors.pop("pos_embed.pos_embed")}
    return written | _written_blocks(tensors, ends, {"transformer_blocks": ("joint_blocks", within, fused)})


def flux(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    ends = {
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    double = {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        **_DOUBLE,
    }
    single = {
        "norm.linear": "modulation.lin",
        "proj_out": "linear2",
        "attn.norm_q.weight": "norm.query_norm.scale",
        "attn.norm_k.weight": "norm.key_norm.scale",
    }
    single_fused = {("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): "linear1"}
    tensors = {name: _swapped(each) if name.startswith("norm_out.") else each for name, each in tensors.items()}
    blocks = {
        "transformer_blocks": ("double_blocks", double, _DOUBLE_FUSED),
        "single_transformer_blocks": ("single_blocks", single, single_fused),
    }
    return _written_blocks(tensors, ends, blocks)


def flux2(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    ends = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    double = {
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
        **_DOUBLE,
    }
    single = {
        "attn.to_qkv_mlp_proj": "linear1",
        "attn.to_out": "linear2",
        "attn.norm_q.weight": "norm.query_norm.scale",
        "attn.norm_k.weight": "norm.key_norm.scale",
    }
    tensors = {name: _swapped(each) if name.startswith("norm_out.") else each for name, each in tensors.items()}
    blocks = {
        "transformer_blocks": ("double_blocks", double, _DOUBLE_FUSED),
        "single_transformer_blocks": ("single_blocks", single, {}),
    }
    return _written_blocks(tensors, ends, blocks)


_DOUBLE = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}
_DOUBLE_FUSED = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn.qkv",
}


def z_image(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    written = {}
    for name, tensor in tensors.items():
        if ".attention.to_q." in name:
            three = [tensors[name.replace(".to_q.", f".to_{which}.")] for which in "qkv"]
            name, tensor = name.replace(".to_q.", ".qkv."), torch.cat(three)
        elif ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        for new, old in {
            "all_final_layer.2-1.": "final_layer.",
            "all_x_embedder.2-1.": "x_embedder.",
            ".attention.to_out.0.": ".attention.out.",
            ".attention.norm_q.": ".attention.q_norm.",
            ".attention.norm_k.": ".attention.k_norm.",
        }.items():
            name = name.replace(new, old)
        written[name] = tensor
    return written


def as_is(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return dict(tensors)


def wan_vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Four levels; a level of the decoder is its residual blocks and then its upsampler, counted through."""
    residual = {
        "norm1.": "residual.0.",
        "conv1.": "residual.2.",
        "norm2.": "residual.3.",
        "conv2.": "residual.6.",
        "conv_shortcut.": "shortcut.",
    }
    blocks = config["num_res_blocks"] + 1
    written = {}
    for name, tensor in tensors.items():
        side, _, rest = name.partition(".")
        if side in ("quant_conv", "post_quant_conv"):
            written[f"{'conv1' if side == 'quant_conv' else 'conv2'}.{rest}"] = tensor
            continue
        inner = {
            "conv_in.": "conv1.",
            "norm_out.": "head.0.",
            "conv_out.": "head.2.",
            "mid_block.attentions.0.": "middle.1.",
            "down_blocks.": "downsamples.",
        }
        for new, old in inner.items():
            rest = rest.replace(new, old)
        rest = re.sub(r"mid_block\.resnets\.(\d)\.", lambda found: f"middle.{2 * int(found[1])}.", rest)
        rest = re.sub(
            r"up_blocks\.(\d+)\.resnets\.(\d+)\.",
            lambda found: f"upsamples.{int(found[1]) * (blocks + 1) + int(found[2])}.",
            rest,
        )
        rest = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0\.",
            lambda found: f"upsamples.{int(found[1]) * (blocks + 1) + blocks}.",
            rest,
        )
        for new, old in residual.items():
            rest = re.sub(rf"(?<=\d\.){re.escape(new)}", old, rest)
        written[f"{side}.{rest}"] = tensor
    return written


def _written_blocks(
    tensors: Tensors,
    ends: dict[str, str],
    blocks: dict[str, tuple[str, dict[str, str], dict[tuple[str, ...], str]]],
) -> Tensors:
    """The tensors under their old names: those of ``blocks`` by number, several fused into one, and the ``ends``."""
    written = {}
    for name, tensor in tensors.items():
        kind, *rest = name.split(".", 2)
        if kind not in blocks:
            stem, last = name.rsplit(".", 1)
            written[f"{ends.get(stem, stem)}.{last}"] = tensor
            continue
        old, names, fused = blocks[kind]
        stem, last = rest[1].rsplit(".", 1)
        here = f"{kind}.{rest[0]}."
        group = next((group for group in fused if stem in group), None)
        if group:
            if stem == group[0]:
                together = torch.cat([tensors[f"{here}{each}.{last}"] for each in group])
                written[f"{old}.{rest[0]}.{fused[group]}.{last}"] = together
        elif rest[1] in names:
            written[f"{old}.{rest[0]}.{names[rest[1]]}"] = tensor
        else:
            written[f"{old}.{rest[0]}.{names[stem]}.{last}"] = tensor
    return written


def stored(folder: Path, component: str) -> Tensors:
    return load_file(next((folder / component).glob("*.safetensors")))


def write(path: Path, **parts: tuple[str, Tensors]) -> Path:
    """One file of several parts, each with its prefix."""
    tensors = {f"{prefix}{name}": tensor for prefix, part in parts.values() for name, tensor in part.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path


def pixart(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """With the table of places and the empty prompt, which the file has and diffusers does not."""
    ends = {
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.linear_": "y_embedder.y_proj.fc",
        "adaln_single.emb.timestep_embedder": "t_embedder.mlp",
        "adaln_single.emb.resolution_embedder": "csize_embedder.mlp",
        "adaln_single.emb.aspect_ratio_embedder": "ar_embedder.mlp",
        "adaln_single.linear": "t_block.1",
        "mlp.linear_1": "mlp.0",
        "mlp.linear_2": "mlp.2",
        "proj_out": "final_layer.linear",
    }
    within = {
        "attn1.to_out.0": "attn.proj",
        "attn2.to_out.0": "cross_attn.proj",
        "attn2.to_q": "cross_attn.q_linear",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
        "transformer_blocks": "blocks",
    }
    joined = {"attn1.to_q": ("attn.qkv", "qkv"), "attn2.to_k": ("cross_attn.kv_linear", "kv")}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    places = (config["sample_size"] // config["patch_size"]) ** 2
    written = {
        "pos_embed": torch.empty(1, places, width, device=tensors["proj_out.weight"].device),
        "y_embedder.y_embedding": torch.empty(
            120 if config["use_additional_conditions"] else 300,
            config["caption_channels"],
            device=tensors["proj_out.weight"].device,
        ),
    }
    for name, tensor in tensors.items():
        first = next((each for each in joined if each in name), None)
        if first is not None:
            target, letters = joined[first]
            pieces = [tensors[name.replace(first, f"{first[:-1]}{letter}")] for letter in letters]
            name, tensor = name.replace(first, target), torch.cat(pieces)
        elif re.search(r"attn1\.to_[kv]|attn2\.to_v", name):
            continue
        elif name == "scale_shift_table":
            name = f"final_layer.{name}"
        names = within if name.startswith("transformer_blocks") else ends
        for new, old in names.items():
            name = name.replace(new, old)
        written[name] = tensor
    return written
