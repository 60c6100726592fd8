"""How fast, at what loss: every choice that trades one for the other, in one frozen value."""

from dataclasses import dataclass, replace
from pathlib import Path

SCHEDULERS = ("checkpoint", "automatic", "euler", "euler trailing", "dpm++ 2m", "ddim", "lcm", "tcd", "flow match")
COMPILE = ("off", "regions", "cuda graphs")
QUANTISATION = ("off", "int8", "int8 dynamic", "float8")
DTYPES = ("automatic", "float32", "float16", "bfloat16")
MEMORY_FORMATS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class SpeedPlan:
    """What Generate is to do. Nothing is checked against a model here: what does not fit one is refused where it runs.

    num_inference_steps, guidance_scale: None leaves both to the caller. scheduler: one of SCHEDULERS; "checkpoint" is
    the one in its folder, "automatic" the one that fits what the checkpoint is. shift: of flow matching's sigmas, None
    for the scheduler's own. step_cache: 0..1, how far the denoiser's input may drift, relative to its size, before it
    is computed again; 0 computes all. unet_cache: every how many steps the deep blocks of a UNet are computed
    (DeepCache, arXiv 2312.00858); 1 is always. decoder: a file or folder of an AutoencoderTiny in place of the model's
    own, None for none; preview: the same, for looks on the way. compile, quantisation, dtype, memory_format: one of
    the tuples above. measure_loss: draw a second time by ``exact()`` and say how far apart the two are.
    """

    name: str = "exact"
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str = "checkpoint"
    shift: float | None = None
    step_cache: float = 0.0
    unet_cache: int = 1
    compile: str = "off"
    quantisation: str = "off"
    decoder: Path | None = None
    preview: Path | None = None
    dtype: str = "automatic"
    memory_format: str = "contiguous"
    measure_loss: bool = False

    def exact(self) -> "SpeedPlan":
        """The same picture without a shortcut: as many steps along the same schedule, each computed whole."""
        kept = {"num_inference_steps", "guidance_scale", "scheduler", "shift"}
        return replace(EXACT, name="exact", **{name: getattr(self, name) for name in kept})


EXACT = SpeedPlan()
