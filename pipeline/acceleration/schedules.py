"""The scheduler that a speed plan asks for, built from the checkpoint's own configuration, or why it does not fit."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoints import Checkpoint
from ..speed_plan import SpeedPlan
from .distillation import Distilled, distilled, predicts_flow, scheduler_config

# diffusers clips what DDIM predicts to -1..1 unless told otherwise, which is right for pixels and never for latents.
_UNCLIPPED = {"clip_sample": False}
_TRAILING = {"timestep_spacing": "trailing"}
# By choice: a class of diffusers, and what is set in it whatever the checkpoint says.
_EPSILON: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),  # arXiv 2206.00364, algorithm 1
    "euler trailing": ("EulerDiscreteScheduler", _TRAILING),  # from the very last timestep: arXiv 2305.08891
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),  # 2211.01095
    "ddim": ("DDIMScheduler", _UNCLIPPED),  # arXiv 2010.02502
    "ddim trailing": ("DDIMScheduler", {**_UNCLIPPED, **_TRAILING}),
    "lcm": ("LCMScheduler", _UNCLIPPED),  # arXiv 2310.04378
    "tcd": ("TCDScheduler", _UNCLIPPED),  # arXiv 2402.19159
}
_CONSISTENCY = ("lcm", "tcd")
# Schedulers whose networks are fed in another way than by any of the above.
_APART = ("SCMScheduler",)


@dataclass(frozen=True)
class Schedule:
    """scheduler: a fresh one of diffusers, for one run; notices: sentences for the user."""

    scheduler: Any
    num_inference_steps: int
    guidance_scale: float
    notices: tuple[str, ...] = ()


def schedule_for(
    checkpoint: Checkpoint, plan: SpeedPlan, num_inference_steps: int | None, guidance_scale: float | None
) -> Schedule:
    """What the plan says of steps, guidance and scheduler, and where it says nothing, what the caller does; where
    neither does, what the model is meant for: its family's, or few steps without guidance if it was distilled so.

    "checkpoint" is the scheduler of the folder as it is. "automatic" is the one that the model was distilled for, told
    by what it is, and the folder's own where nothing says that it was; any other is built from the configuration of
    the folder's. Except by "checkpoint", guidance is off (1) for a model that was distilled without it, unless the plan
    sets it by hand. Raises ValueError for a scheduler, a shift or a number of steps that the model cannot have.
    """
    steps = plan.num_inference_steps or num_inference_steps
    guidance = guidance_scale if plan.guidance_scale is None else plan.guidance_scale
    if steps is None or guidance is None:
        usual = _usual(checkpoint)
        steps, guidance = usual[0] if steps is None else steps, usual[1] if guidance is None else guidance
    if plan.scheduler == "checkpoint":
        return Schedule(_own(checkpoint, plan.shift), steps, guidance)
    how = distilled(checkpoint)
    scheduler = _automatic(checkpoint, plan.shift, how) if plan.scheduler == "automatic" else _chosen(checkpoint, plan)
    most = scheduler.config.get("original_inference_steps")
    if most is not None and steps > most:
        raise ValueError(
            f"{checkpoint.folder.name}: expected at most {most} steps, into which {type(scheduler).__name__} divides "
            f"its walk, got {steps}"
        )
    guidance, told = _guidance(checkpoint, plan, guidance, how)
    return Schedule(scheduler, steps, guidance, (*_told(checkpoint, plan, scheduler, steps, how), *told))


def _usual(checkpoint: Checkpoint) -> tuple[int, float]:
    family, how = checkpoint.family, distilled(checkpoint)
    if how is None:
        return family.default_steps, family.default_guidance
    return how.steps or family.few_steps, family.default_guidance if how.hears_guidance else 1.0


def _automatic(checkpoint: Checkpoint, shift: float | None, how: Distilled | None) -> Any:
    if how is None or how.walk == "checkpoint" or _needs_its_own(checkpoint):
        return _own(checkpoint, shift)
    if predicts_flow(*scheduler_config(checkpoint)):
        dynamic = scheduler_config(checkpoint)[1].get("use_dynamic_shifting")
        if shift is None and how.shift is not None and dynamic:
            # Distilled at one shift for all sizes, and to the very end.
            return _own(checkpoint, how.shift, **{"shift_terminal": None})
        return _own(checkpoint, shift)
    _refuse_shift(checkpoint, shift)
    return _made(checkpoint, how.walk, **({"prediction_type": how.predicts} if how.predicts else {}))


def _chosen(checkpoint: Checkpoint, plan: SpeedPlan) -> Any:
    choice, name = plan.scheduler, checkpoint.folder.name
    own, config = scheduler_config(checkpoint)
    if reason := _needs_its_own(checkpoint):
        same = {"flow match": "FlowMatchEulerDiscreteScheduler", "lcm": "LCMScheduler"}.get(choice)
        if same == own:
            return _own(checkpoint, plan.shift)
        raise ValueError(f"{name}: expected its own scheduler, {own}, since {reason}; got {choice!r}")
    flow = predicts_flow(own, config)
    if choice == "flow match":
        if not flow:
            raise ValueError(
                f"{name}: expected a scheduler for a model that predicts noise or velocity, such as its own {own}; got "
                f"{choice!r}, which is for models of flow matching"
            )
        return _flow_match(checkpoint, own, config, plan.shift)
    if not flow:
        _refuse_shift(checkpoint, plan.shift)
        return _made(checkpoint, choice)
    # diffusers' pipelines around FlowMatchEuler hand it sigmas, and lay noise over pictures by a method of its own.
    if choice == "dpm++ 2m" and not own.startswith("FlowMatch"):
        return _own(checkpoint, plan.shift, algorithm_type="dpmsolver++", solver_order=2)
    fitting = ["flow match"] if own.startswith("FlowMatch") else ["flow match", "dpm++ 2m"]
    raise ValueError(
        f"{name}: expected {' or '.join(map(repr, fitting))}, since {checkpoint.family.name} is a model of flow "
        f"matching; got {choice!r}, which is for models that predict noise"
    )


def _own(checkpoint: Checkpoint, shift: float | None, **changes: Any) -> Any:
    scheduler = checkpoint.scheduler()
    if shift is not None:
        changes |= _shifted(checkpoint, scheduler.config, shift)
    return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler


def _made(checkpoint: Checkpoint, choice: str, **changes: Any) -> Any:
    class_name, fixed = _EPSILON[choice]
    return _from(checkpoint.scheduler().config, class_name, {**fixed, **changes})


def _flow_match(checkpoint: Checkpoint, own: str, config: Mapping[str, Any], shift: float | None) -> Any:
    class_name = "FlowMatchEulerDiscreteScheduler"
    if own == class_name:
        return _own(checkpoint, shift)
    train = config.get("num_train_timesteps", 1000)
    settled = config.get("shift", config.get("flow_shift", 1.0)) if shift is None else shift
    return _from({"num_train_timesteps": train}, class_name, {"shift": settled})


def _from(config: Mapping[str, Any], class_name: str, changes: Mapping[str, Any]) -> Any:
    made: Any = getattr(importlib.import_module("diffusers"), class_name)
    return made.from_config(config, **changes)


def _shifted(checkpoint: Checkpoint, config: Mapping[str, Any], shift: float) -> dict[str, Any]:
    """How a configuration says it: s becomes shift * s / (1 + (shift - 1) * s), arXiv 2403.03206, equation 23."""
    if checkpoint.family.tasks is None:
        raise ValueError(
            f"{checkpoint.folder.name}: expected no shift for {checkpoint.family.name}, whose steps are equal; got "
            f"{shift:g}"
        )
    own, _ = scheduler_config(checkpoint)
    if predicts_flow(own, config):
        for name in ("shift", "flow_shift"):
            if name in config:
                # A dynamic one follows the picture's size, and would be used in place of this.
                fixed = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in config else {}
                return {name: shift, **fixed}
    raise _no_shift(checkpoint, own, shift)


def _refuse_shift(checkpoint: Checkpoint, shift: float | None) -> None:
    if shift is not None:
        raise _no_shift(checkpoint, scheduler_config(checkpoint)[0], shift)


def _no_shift(checkpoint: Checkpoint, own: str, shift: float) -> ValueError:
    return ValueError(
        f"{checkpoint.folder.name}: expected no shift, which is of the sigmas of flow matching; its scheduler, {own}, "
        f"has none to shift; got {shift:g}"
    )


def _needs_its_own(checkpoint: Checkpoint) -> str:
    """Why no other scheduler will do; empty where one may."""
    family, (own, _) = checkpoint.family, scheduler_config(checkpoint)
    if family.tasks is None:
        return f"{family.name} walks from a first picture in equal steps"
    if own in _APART:
        return f"{family.name} is fed as only that one feeds it"
    if family.tasks.text_to_image == "LatentConsistencyModelPipeline":
        return "its pipeline shows what that one alone gives, the picture as foreseen at each step"
    return ""


def _guidance(
    checkpoint: Checkpoint, plan: SpeedPlan, scale: float, how: Distilled | None
) -> tuple[float, tuple[str, ...]]:
    if how is None or how.hears_guidance or not checkpoint.family.takes_negative or scale <= 1:
        return scale, ()
    name = checkpoint.folder.name
    if plan.guidance_scale is not None:
        told = f"{name} was distilled without guidance ({how.because}): {scale:g} takes twice the time, and may burn"
        return scale, (told,)
    return 1.0, (f"guidance is off (1 in place of {scale:g}): {name} was distilled without it",)


def _told(
    checkpoint: Checkpoint, plan: SpeedPlan, scheduler: Any, steps: int, how: Distilled | None
) -> tuple[str, ...]:
    name, made = checkpoint.folder.name, type(scheduler).__name__
    found = []
    if plan.scheduler == "automatic" and how is not None:
        only = "; that is a name alone, so choose the scheduler by hand if it misleads" if how.by_name else ""
        found.append(f"{name} is taken for a distilled model, and walked by {made}: {how.because}{only}")
    if plan.scheduler in _CONSISTENCY and (how is None or how.walk not in (*_CONSISTENCY, "checkpoint")):
        found.append(
            f"{made} is for models distilled for it, by themselves or by a LoRA; nothing says so of {name}, and what "
            "it draws may be blurred"
        )
    if how is not None and how.steps is not None and how.steps != steps:
        found.append(f"made for {how.steps} {'step' if how.steps == 1 else 'steps'}, drawn in {steps}: {how.because}")
    return tuple(found)
