"""Diffusers folders of the real classes at tiny sizes, with random weights, for the tests of what loads them."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, FlowMatchEulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
)

from pipeline.fusing.fusion_network import FusionNetwork

PROMPTS: dict[str, str] = json.loads(Path(__file__).with_name("prompts.json").read_text("utf-8"))
MINI = {
    "_class_name": "DuetMiniPipeline",
    "_diffusers_version": "0.42.1",
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "image_encoder": ["transformers", "ResNetModel"],
    "fusion": ["duet", "FusionNetwork"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderDC"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}
STABLE_DIFFUSION = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
MODELS = ("text_encoder", "image_encoder", "fusion", "unet", "vae")  # the parts of the first that have weights
WORDS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "a", "rose", "red", "car"]


def save_mini(folder: Path, seed: int = 0) -> Path:
    """The small model's layout, each part a few thousand parameters in float16."""
    torch.manual_seed(seed)
    _save_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(**_text_sizes(), projection_dim=16, bos_token_id=2, eos_token_id=3)
    resnet = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    parts: dict[str, Any] = {
        "text_encoder": CLIPTextModelWithProjection(text),
        "image_encoder": ResNetModel(resnet),
        "fusion": FusionNetwork(text_width=16, image_width=16, width=16, hidden=24, grid=8, channels=16),
        "unet": _unet(in_channels=32, out_channels=16, cross_attention_dim=16),
        "vae": AutoencoderDC(
            in_channels=4,
            latent_channels=16,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 16, 16),
            decoder_block_out_channels=(8, 8, 16, 16),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), ()),
            decoder_qkv_multiscales=((), (), (), ()),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=1.0,
        ),
    }
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    return _save(folder, MINI, parts)


def save_stable_diffusion(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion 1.5's layout, with the tokenizer's format but ten words."""
    torch.manual_seed(seed)
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b", "ab</w>"]
    merges: Any = [("a", "b</w>")]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, merges=merges)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    parts: dict[str, Any] = {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**_text_sizes(), bos_token_id=0, eos_token_id=1)),
        "unet": _unet(in_channels=4, out_channels=4, cross_attention_dim=32),
        "vae": AutoencoderKL(**_vae_sizes()),
    }
    PNDMScheduler(skip_prk_steps=True, steps_offset=1).save_pretrained(folder / "scheduler")
    return _save(folder, STABLE_DIFFUSION, parts)


def write_index(folder: Path, index: dict[str, Any]) -> Path:
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _text_sizes() -> dict[str, Any]:
    return {
        "vocab_size": 16,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "pad_token_id": 0,
    }


def _vae_sizes() -> dict[str, Any]:
    return {
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8,) * 4,
        "norm_num_groups": 4,
    }


def _unet(**channels: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        **channels,
    )


def _save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=77,
    ).save_pretrained(str(folder))


def _save(folder: Path, index: dict, parts: dict[str, Any]) -> Path:
    for name, part in parts.items():
        part.half().save_pretrained(folder / name)
    return write_index(folder, index)
