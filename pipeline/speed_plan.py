"""How fast, at what loss: every choice that trades one for the other, in one frozen value."""

from dataclasses import dataclass, replace
from pathlib import Path

SCHEDULERS = ("checkpoint", "automatic", "euler", "euler trailing", "dpm++ 2m", "ddim", "lcm", "tcd", "flow match")
COMPILE = ("off", "regions", "cuda graphs")
QUANTISATION = ("off", "int8", "int8 dynamic", "float8")
DTYPES = ("automatic", "fastest", "float32", "float16", "bfloat16")
MEMORY_FORMATS = ("contiguous", "channels_last")

MOST_STEPS, LARGEST_GUIDANCE, LARGEST_SHIFT, LONGEST_INTERVAL = 1000, 100.0, 100.0, 100

# What a preset leaves out where it cannot be; each is off at the value of EXACT.
SHORTCUTS = ("step_cache", "unet_cache", "compile", "quantisation", "memory_format")


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
    where_it_fits: those of SHORTCUTS that are left out, with a notice, where the model or the machine cannot do them or
    they cannot pay; all others are refused there. Raises ValueError for a number or a choice out of range.
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
    where_it_fits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for said, value, low, high in (
            ("steps", self.num_inference_steps, 1, MOST_STEPS),
            ("guidance scale", self.guidance_scale, 0, LARGEST_GUIDANCE),
            ("shift", self.shift, 0.01, LARGEST_SHIFT),
            ("step cache", self.step_cache, 0, 1),
            ("UNet cache", self.unet_cache, 1, LONGEST_INTERVAL),
        ):
            if value is not None and not low <= value <= high:  # not a number is in no range
                raise ValueError(f"{said} of a speed plan must be {low:g} to {high:g}, got {value:g}")
        for said, value, known in (
            ("scheduler", self.scheduler, SCHEDULERS),
            ("compile", self.compile, COMPILE),
            ("quantisation", self.quantisation, QUANTISATION),
            ("dtype", self.dtype, DTYPES),
            ("memory format", self.memory_format, MEMORY_FORMATS),
            *(("what is left out where it does not fit", name, SHORTCUTS) for name in self.where_it_fits),
        ):
            if value not in known:
                raise ValueError(f"{said} of a speed plan must be one of {', '.join(known)}; got {str(value)[:80]!r}")

        by_hand = {"step_cache", "unet_cache"}.isdisjoint(self.where_it_fits)
        if self.step_cache > 0 and self.unet_cache > 1 and by_hand:
            raise ValueError(
                "expected a step cache or a UNet cache in a speed plan, since neither can judge what the other skips; "
                f"got both, {self.step_cache:g} and every {self.unet_cache} steps"
            )
        if self.quantisation != "off" and self.memory_format != "contiguous":
            raise ValueError(
                "expected quantised weights or another memory format in a speed plan, since either is a model of its "
                f"own; got both, {self.quantisation} and {self.memory_format}"
            )

    def exact(self) -> "SpeedPlan":
        """The same picture without a shortcut: as many steps along the same schedule, each computed whole."""
        kept = {"num_inference_steps", "guidance_scale", "scheduler", "shift"}
        return replace(EXACT, name="exact", **{name: getattr(self, name) for name in kept})

    def in_float32(self) -> "SpeedPlan":
        """The same in full precision, and not compiled: what a stage is tried by once more when it gave no numbers."""
        return replace(self, dtype="float32", quantisation="off", compile="off")

    def __str__(self) -> str:
        """The dials that are not as in ``EXACT``, in words."""
        set_here = {
            "steps": self.num_inference_steps,
            "guidance scale": self.guidance_scale,
            "scheduler": None if self.scheduler == "checkpoint" else self.scheduler,
            "shift": self.shift,
            "step cache": self.step_cache or None,
            "UNet cache": None if self.unet_cache == 1 else f"every {self.unet_cache} steps",
            "compile": None if self.compile == "off" else self.compile,
            "quantisation": None if self.quantisation == "off" else self.quantisation,
            "decoder": self.decoder and self.decoder.name,
            "preview": self.preview and self.preview.name,
            "dtype": None if self.dtype == "automatic" else self.dtype,
            "memory format": None if self.memory_format == "contiguous" else self.memory_format,
            "loss": "measured" if self.measure_loss else None,
        }
        said = [f"{dial} {value}" for dial, value in set_here.items() if value is not None]
        return f"{self.name}: {', '.join(said) or 'every step whole, as Generate says'}"

    @property
    def takes_shortcuts(self) -> bool:
        """Whether its pictures may differ from those of ``exact()``."""
        same = {name: getattr(self, name) for name in ("name", "preview", "measure_loss", "where_it_fits")}
        return self != replace(self.exact(), **same)


EXACT = SpeedPlan()
# The few steps of a distilled model, along the schedule it was distilled for. So few leave a cache nothing to save.
LIGHTNING = SpeedPlan(name="lightning", num_inference_steps=4, scheduler="automatic", dtype="fastest")
# What costs little that can be seen: as many steps as Generate says, of which caches skip what hardly changes.
BALANCED = SpeedPlan(
    name="balanced", scheduler="automatic", step_cache=0.1, unet_cache=3, dtype="fastest", where_it_fits=SHORTCUTS
)
PRESETS = {plan.name: plan for plan in (LIGHTNING, BALANCED, EXACT)}
