"""A diffusers folder of every family: the real classes at tiny sizes, random float32 weights, words of single bytes."""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from tokenizers import pre_tokenizers

from tests.pipeline.folders import write_index

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # one printable character for each of the 256 bytes
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_family(name: str, folder: Path, seed: int = 0) -> Path:
    """One of FAMILY_FOLDERS, the same for the same seed."""
    torch.manual_seed(seed)
    pipeline, make = FAMILY_FOLDERS[name]
    parts: dict[str, Any] = make()
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    for component, part in parts.items():
        part.save_pretrained(str(folder / component))
        library = type(part).__module__.split(".")[0]
        index[component] = ["kolors" if "ChatGLM" in type(part).__name__ else library, type(part).__name__]
    return write_index(folder, index)


# --- tokenizers: every text can be written in them, and none is a unit longer than a byte or a character ---


def clip_tokenizer() -> Any:
    words = [*BYTES, *(f"{byte}</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 77
    return tokenizer


def qwen_tokenizer() -> Any:
    vocabulary = {byte: number for number, byte in enumerate(BYTES)}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = _CHAT
    return tokenizer


def t5_tokenizer(window: int = 512) -> Any:
    words = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(code) for code in range(33, 127))]
    return transformers.T5Tokenizer(vocab=[(word, 0.0) for word in words], extra_ids=0, model_max_length=window)


def bert_tokenizer() -> Any:
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=77)


def gemma_tokenizer() -> Any:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    tokenizer = transformers.GemmaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 8192
    return tokenizer


def chatglm_tokenizer() -> Any:
    """Its vocabulary is a file of sentencepiece, which is learned here from one sentence and all bytes."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red rose and a blue car"] * 4),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    path = Path(tempfile.mkdtemp()) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return ChatGLMTokenizer(str(path))


# --- encoders ---


def clip(width: int = 32, layers: int = 2, projection: int | None = None, **options: Any) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        projection_dim=projection or width,
        **options,
    )
    return transformers.CLIPTextModelWithProjection(config) if projection else transformers.CLIPTextModel(config)


def t5(width: int = 32) -> Any:
    config = transformers.T5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=80,
    )
    return transformers.BertModel(config)


def _qwen3(layers: int) -> Any:
    return transformers.Qwen3Config(
        vocab_size=272,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        max_window_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def qwen_vl() -> Any:
    config: Any = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 272,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "max_window_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=260,
        video_token_id=261,
        vision_start_token_id=262,
        vision_end_token_id=263,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=272,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=1024,
    )
    return transformers.Gemma2Model(config)


def chatglm() -> Any:
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=320,
        hidden_size=16,
        ffn_hidden_size=16,
        kv_channels=8,
        num_attention_heads=2,
        multi_query_attention=True,
        multi_query_group_num=1,
        seq_length=256,
        add_qkv_bias=True,
        original_rope=True,
    )
    model = ChatGLMModel(config).float()
    for name, parameter in model.named_parameters():  # it is made of empty memory, which a checkpoint fills
        torch.nn.init.normal_(parameter, mean=1.0 if "layernorm" in name else 0.0, std=0.02)
    return model


# --- decoders and denoisers ---


def vae(channels: int = 4, **options: Any) -> Any:
    blocks: dict[str, Any] = {  # annotated as tuples of one
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8,) * 4,
    }
    return diffusers.AutoencoderKL(latent_channels=channels, norm_num_groups=4, **blocks, **options)


def unet(cross_attention_dim: int, **options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=cross_attention_dim,
        **{"attention_head_dim": 2, **options},
    )


_SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion() -> dict[str, Any]:
    return {
        "tokenizer": clip_tokenizer(),
        "text_encoder": clip(),
        "unet": unet(32),
        "vae": vae(),
        "scheduler": diffusers.PNDMScheduler(**_SD_BETAS, skip_prk_steps=True, steps_offset=1),
    }


def stable_diffusion_2() -> dict[str, Any]:
    return stable_diffusion() | {
        "text_encoder": clip(hidden_act="gelu"),
        "unet": unet(32, use_linear_projection=True),
        "scheduler": diffusers.DDIMScheduler(
            **_SD_BETAS, prediction_type="v_prediction", clip_sample=False, steps_offset=1
        ),
    }


def stable_diffusion_turbo() -> dict[str, Any]:
    scheduler = diffusers.EulerDiscreteScheduler(**_SD_BETAS, timestep_spacing="trailing", steps_offset=1)
    return stable_diffusion_2() | {"scheduler": scheduler}


def latent_consistency() -> dict[str, Any]:
    return stable_diffusion() | {
        "unet": unet(32, time_cond_proj_dim=32),
        "scheduler": diffusers.LCMScheduler(**_SD_BETAS, original_inference_steps=50),
    }


def stable_diffusion_xl() -> dict[str, Any]:
    added: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return {
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder": clip(),
        "text_encoder_2": clip(projection=16, hidden_act="gelu"),
        "unet": unet(64, use_linear_projection=True, projection_class_embeddings_input_dim=16 + 6 * 8, **added),
        "vae": vae(scaling_factor=0.13025),
        "scheduler": diffusers.EulerDiscreteScheduler(**_SD_BETAS, timestep_spacing="leading", steps_offset=1),
    }


def stable_diffusion_3() -> dict[str, Any]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,  # its inpainting pipeline takes no other number
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return {
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": t5_tokenizer(),
        "text_encoder": clip(16, projection=16),
        "text_encoder_2": clip(16, projection=16, hidden_act="gelu"),
        "text_encoder_3": t5(),
        "transformer": transformer,
        "vae": vae(16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def flux(distilled: bool = False) -> dict[str, Any]:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=not distilled,
        axes_dims_rope=(4, 4, 8),
    )
    return {
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "text_encoder": clip(),
        "text_encoder_2": t5(),
        "transformer": transformer,
        "vae": vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            shift=1.0 if distilled else 3.0, use_dynamic_shifting=not distilled
        ),
    }


def flux_2_klein() -> dict[str, Any]:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,  # three layers of the encoder, side by side
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    decoder = diffusers.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )
    return {
        "tokenizer": qwen_tokenizer(),
        "text_encoder": transformers.Qwen3ForCausalLM(_qwen3(28)),  # its pipeline asks for layers 9, 18 and 27
        "transformer": transformer,
        "vae": decoder,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def qwen_image() -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,  # as in the layout of single files, whose names count through the blocks
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return {
        "tokenizer": qwen_tokenizer(),
        "text_encoder": qwen_vl(),
        "transformer": transformer,
        "vae": decoder,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=0.02
        ),
    }


def z_image() -> dict[str, Any]:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    # Its padding tokens are made empty, and a checkpoint fills them.
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return {
        "tokenizer": qwen_tokenizer(),
        "text_encoder": transformers.Qwen3Model(_qwen3(2)),
        "transformer": transformer,
        "vae": vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def sana(sprint: bool = False) -> dict[str, Any]:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
        **({"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"} if sprint else {}),
    )
    decoder = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {
        "tokenizer": gemma_tokenizer(),
        "text_encoder": gemma(),
        "transformer": transformer,
        "vae": decoder,
        "scheduler": diffusers.SCMScheduler() if sprint else diffusers.DPMSolverMultistepScheduler(**flow),
    }


def pixart(sigma: bool = False) -> dict[str, Any]:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=24,
        caption_channels=32,
        sample_size=128,
        use_additional_conditions=not sigma,
    )
    return {
        "tokenizer": t5_tokenizer(300 if sigma else 120),
        "text_encoder": t5(),
        "transformer": transformer,
        "vae": vae(),
        "scheduler": diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    }


def kolors() -> dict[str, Any]:
    added: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    projected: dict[str, Any] = {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}
    return {
        "tokenizer": chatglm_tokenizer(),
        "text_encoder": chatglm(),
        "unet": unet(32, projection_class_embeddings_input_dim=16 + 6 * 8, **added, **projected),
        "vae": vae(scaling_factor=0.13025),
        "scheduler": diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear", steps_offset=1
        ),
    }


def hunyuan_dit() -> dict[str, Any]:
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=128,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
        use_style_cond_and_image_meta_size=False,
    )
    return {
        "tokenizer": bert_tokenizer(),
        "tokenizer_2": t5_tokenizer(256),
        "text_encoder": bert(),
        "text_encoder_2": t5(),
        "transformer": transformer,
        "vae": vae(scaling_factor=0.13025),
        "scheduler": diffusers.DDPMScheduler(
            **dict(_SD_BETAS, beta_end=0.018), prediction_type="v_prediction", steps_offset=1
        ),
    }


# By a short name: the _class_name of model_index.json, and what makes the components.
FAMILY_FOLDERS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "sd15": ("StableDiffusionPipeline", stable_diffusion),
    "sd2": ("StableDiffusionPipeline", stable_diffusion_2),
    "sd_turbo": ("StableDiffusionPipeline", stable_diffusion_turbo),
    "sdxl": ("StableDiffusionXLPipeline", stable_diffusion_xl),
    "lcm": ("LatentConsistencyModelPipeline", latent_consistency),
    "sd3": ("StableDiffusion3Pipeline", stable_diffusion_3),
    "flux_dev": ("FluxPipeline", flux),
    "flux_schnell": ("FluxPipeline", lambda: flux(distilled=True)),
    "flux2_klein": ("Flux2KleinPipeline", flux_2_klein),
    "qwen_image": ("QwenImagePipeline", qwen_image),
    "z_image": ("ZImagePipeline", z_image),
    "sana": ("SanaPipeline", sana),
    "sana_sprint": ("SanaSprintPipeline", lambda: sana(sprint=True)),
    "pixart_alpha": ("PixArtAlphaPipeline", pixart),
    "pixart_sigma": ("PixArtSigmaPipeline", lambda: pixart(sigma=True)),
    "kolors": ("KolorsPipeline", kolors),
    "hunyuan_dit": ("HunyuanDiTPipeline", hunyuan_dit),
}
