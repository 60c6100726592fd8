"""Models of full size with random weights, and the two graphs that draw with them: Duet's blocks and the host's own."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._stock_host import Prompt, node

WORDS, UNWANTED = "a red rose in a glass vase, oil on canvas", "blurred"


@dataclass(frozen=True)
class Job:
    """What both sides are to draw. guidance above 1 steers away from UNWANTED at twice the work."""

    model: str
    side: int
    steps: int
    guidance: float = 1.0
    batch: int = 1


def save_model(folder: Path, model: str, steps: int) -> Path:
    """model: "sd15" or "sdxl", a diffusers folder in float16, whose schedule of ``steps`` steps is the host's "simple".

    That takes every 1000/steps-th timestep from the last one down: "leading" steps, moved to end at it.
    """
    from tests.host.stable_diffusion_15 import save_scheduler, save_stable_diffusion_15

    if not folder.exists():  # else kept from an earlier run
        {"sd15": save_stable_diffusion_15, "sdxl": _save_stable_diffusion_xl}[model](folder)
    save_scheduler(folder, timestep_spacing="leading", steps_offset=999 - (steps - 1) * (1000 // steps))
    return folder


def our_graph(job: Job, seed: int) -> Prompt:
    return {
        "model": node("DuetLoadModel", model=job.model),
        "words": node("DuetEmbedText", model=("model", 0), prompt=WORDS, negative_prompt=UNWANTED),
        "fuse": node("DuetFuse", model=("model", 0), prompt_embeds=("words", 0), method="concat", strength=0.5),
        "picture": node(
            "DuetGenerate", model=("model", 0), conditioning=("fuse", 0), seed=seed, steps=job.steps,
            guidance_scale=job.guidance, width=job.side, height=job.side, batch_size=job.batch,
        ),
        "shown": node("PreviewImage", images=("picture", 0)),
    }  # fmt: skip


def stock_graph(job: Job, seed: int) -> Prompt:
    return {
        "model": node("DiffusersLoader", model_path=job.model),
        "words": node("CLIPTextEncode", clip=("model", 1), text=WORDS),
        "unwanted": node("CLIPTextEncode", clip=("model", 1), text=UNWANTED),
        "empty": node("EmptyLatentImage", width=job.side, height=job.side, batch_size=job.batch),
        "sampled": node(
            "KSampler", model=("model", 0), positive=("words", 0), negative=("unwanted", 0), latent_image=("empty", 0),
            seed=seed, steps=job.steps, cfg=job.guidance, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "picture": node("VAEDecode", samples=("sampled", 0), vae=("model", 2)),
        "shown": node("PreviewImage", images=("picture", 0)),
    }  # fmt: skip


def plain_diffusers(job: Job, checkpoint: Any, cache: Any, condition: Any) -> Callable[[int], Any]:
    """diffusers' own pipeline, eager, around the very modules that Duet's cache holds; a call with a seed draws.

    condition: what Fuse gave, so that no side reads the words again. Gives (B, 3, H, W) in 0..1 on the CPU.
    """
    import diffusers
    import torch

    kind: Any = getattr(diffusers, checkpoint.family.tasks.text_to_image)
    parts = {name: None for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "safety_checker")}
    accepted = set(inspect.signature(kind.__init__).parameters)
    parts |= {"feature_extractor": None, "scheduler": checkpoint.scheduler()}

    def draw(seed: int) -> Any:
        generators = [torch.Generator("cpu").manual_seed(seed + number) for number in range(job.batch)]
        with checkpoint.use(cache, "unet") as unet, checkpoint.use(cache, "vae") as vae, torch.inference_mode():
            given = parts | {"unet": unet, "vae": vae, "requires_safety_checker": False}
            pipeline = kind(**{name: part for name, part in given.items() if name in accepted})
            pipeline.set_progress_bar_config(disable=True)
            # It has replaced the schedule by one that it likes better, and which the other sides do not walk along.
            pipeline.scheduler = checkpoint.scheduler()
            sides = {"prompt_embeds": condition.tokens, "negative_prompt_embeds": condition.negative.tokens}
            if condition.pooled is not None and "text_encoder_2" in accepted:
                sides["pooled_prompt_embeds"] = condition.pooled
                sides["negative_pooled_prompt_embeds"] = condition.negative.pooled
            told = {
                name: side.to(unet.device, unet.dtype).expand(job.batch, *side.shape[1:])
                for name, side in sides.items()
            }
            shape = (unet.config.in_channels, job.side // 8, job.side // 8)
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            drawn = pipeline(
                **told, latents=noise.to(unet.device, unet.dtype), num_inference_steps=job.steps,
                guidance_scale=job.guidance, width=job.side, height=job.side, output_type="pt",
            )  # fmt: skip
            return drawn.images.float().cpu()

    return draw


def _save_stable_diffusion_xl(folder: Path) -> Path:
    """3.5 billion parameters in float16: 6.9 GB on disk. From the configurations that ship with the pack."""
    import diffusers
    import torch
    import transformers

    from pipeline.files.single_file import CONFIGS
    from tests.host.stable_diffusion_15 import LOUDER, make_louder, name_as_published, save_tokenizer

    torch.manual_seed(0)
    layout = CONFIGS / "sdxl"
    index = json.loads((layout / "model_index.json").read_text(encoding="utf-8"))
    index = {name: entry[:2] if isinstance(entry, list) else entry for name, entry in index.items()}  # without notes
    for name in ("tokenizer", "tokenizer_2"):
        save_tokenizer(folder / name)
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        library, class_name = index[name]
        config = json.loads((layout / name / "config.json").read_text(encoding="utf-8"))
        kind: Any = getattr(diffusers if library == "diffusers" else transformers, class_name)
        by_diffusers = library == "diffusers"
        module = kind.from_config(config) if by_diffusers else kind(kind.config_class.from_dict(config))
        with torch.no_grad():
            if name == "unet":
                make_louder(module.conv_out, LOUDER["noise"])
                for path, part in module.named_modules():
                    if path.endswith("attn2"):
                        make_louder(part.to_out[0], LOUDER["words"])
            elif name == "vae":
                make_louder(module.decoder.conv_out, LOUDER["picture"])
        module.half().save_pretrained(folder / name)
        if library == "transformers":
            name_as_published(folder / name / "model.safetensors")
        del module
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
