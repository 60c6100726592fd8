"""Steps that the denoiser does not compute, since what it would say has hardly changed.

Transformers that diffusers' FirstBlockCache fits take that one, which runs the first block and compares, such as FLUX.1
and Qwen-Image. For UNets, the small model's among them, and the other transformers it is done here, in the way of
TeaCache (arXiv 2411.19108): an estimate of the error is added up over the steps that are passed over, and the step that
would carry it beyond the threshold is computed. Two things differ. TeaCache guesses the relative change of the
prediction (its equation 4) from the input, by a polynomial that is fitted to each model; here it is the change between
the last two computed steps, for the time that has passed since. And it is weighed by the length of the step, the
relative change of the input at the last one, since that is how far a wrong prediction leads astray: the sum is how far
the latents may have drifted, relative to their size.
"""

import importlib
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor, nn

from .guidance_branches import Call, GuidanceBranches, call_of, check_told
from .run_hooks import RunHook, hook_on, run_view
from .work import Work

FEWEST_STEPS = 3
_FEW_STEPS = 4
_HOOK, _COUNT = "duet_step_cache", "duet_block_count"
_BLOCKS = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers", "temporal_transformer_blocks")


def with_step_cache(denoiser: Any, threshold: float, num_inference_steps: int, work: Work) -> Any:
    """A private view of ``denoiser`` for one run, which takes steps from the ones before where little would change.

    threshold: 0..1, how far the latents may drift from where they would be, relative to their size, until the next step
    is computed; for FirstBlockCache, how far its first block's output may change. 0 computes everything.
    num_inference_steps: of the run, as often as each side of guidance is called; after the last one nothing is held.
    Here the first two steps are computed, and the last one where there are more than four. Both sides of guidance are
    kept apart, whether they come as one doubled batch or in calls of their own; a batch is computed, or not, as one.
    Raises ValueError for fewer than three steps, of which none could be spared, and for a denoiser that is not told one
    tensor and a timestep.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"expected a threshold of the step cache of 0 to 1, got {threshold}")
    if threshold > 0 and num_inference_steps < FEWEST_STEPS:
        raise ValueError(
            f"expected {FEWEST_STEPS} steps or more for a step cache, since the first two are always computed; "
            f"got {num_inference_steps}"
        )
    check_told(denoiser)
    view = run_view(denoiser)
    blocks = _blocks_of(view)
    if threshold > 0 and hasattr(view, "enable_cache") and _first_block_cache_fits(blocks):
        return _with_first_block_cache(view, blocks, threshold, num_inference_steps, work)
    hook_on(view, _StepHook(threshold, num_inference_steps, work, len(blocks)), _HOOK)
    return view


@dataclass(frozen=True)
class _Computed:
    """A step that was computed. rate: relative change of the prediction for each unit of time before it.

    kind: the type of what the denoiser gives: a tensor, a tuple, or an output of diffusers.
    """

    time: float
    prediction: Tensor
    kind: type
    rate: float | None

    def output(self) -> Any:
        prediction = self.prediction.clone()  # whoever asked may change it in place
        if issubclass(self.kind, Tensor):
            return prediction
        return (prediction,) if self.kind is tuple else self.kind(sample=prediction)


@dataclass
class _Branch:
    """Of one side of guidance. sample: of its step before; drift: of the latents since ``last``, as estimated."""

    last: _Computed | None = None
    sample: Tensor | None = None
    drift: float = 0.0


class _StepHook(RunHook):
    _is_stateful = True

    def __init__(self, threshold: float, num_inference_steps: int, work: Work, blocks: int) -> None:
        super().__init__()
        self._threshold, self._steps, self._work, self._blocks = threshold, num_inference_steps, work, blocks
        self._branches = GuidanceBranches(_Branch, num_inference_steps)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = call_of(module, args, kwargs)
        branch, step = self._branches.enter(call)
        now = _time(call)
        work = self._work
        if self._may_pass(branch, step, now, call.sample):
            assert branch.last is not None, "a step before any computed one"
            output = branch.last.output()
            work.steps_from_cache += 1
            work.blocks_skipped += self._blocks
        else:
            output = self.original(*args, **kwargs)
            branch.last, branch.drift = _computed(branch.last, now, output), 0.0
            work.steps_computed += 1
            work.blocks_computed += self._blocks
        branch.sample = call.sample
        self._branches.leave(branch)
        return output

    def _may_pass(self, branch: _Branch, step: int, now: float, sample: Tensor) -> bool:
        last = branch.last
        if self._threshold == 0 or last is None or last.rate is None or branch.sample is None:
            return False
        if step == self._steps - 1 and self._steps > _FEW_STEPS:
            return False
        # The last step's length stands for that of the one to come.
        length = (sample - branch.sample).abs().mean() / sample.abs().mean()
        branch.drift += last.rate * abs(now - last.time) * length.item()
        return branch.drift < self._threshold

    def reset_state(self, module: nn.Module) -> nn.Module:
        self._branches.clear()
        return module


def _computed(before: _Computed | None, now: float, output: Any) -> _Computed:
    prediction = output if isinstance(output, Tensor) else output[0]
    rate = None
    if before is not None and before.prediction.shape == prediction.shape and before.time != now:
        change = (prediction - before.prediction).abs().mean() / prediction.abs().mean()
        rate = change.item() / abs(now - before.time)
    return _Computed(now, prediction.clone(), type(output), rate)


def _time(call: Call) -> float:
    timestep = call.timestep
    return float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)


def _blocks_of(denoiser: Any) -> list[nn.Module]:
    if hasattr(denoiser, "down_blocks"):
        middle = getattr(denoiser, "mid_block", None)
        return [*denoiser.down_blocks, *([] if middle is None else [middle]), *denoiser.up_blocks]
    lists = [part for name, part in denoiser.named_children() if name in _BLOCKS and isinstance(part, nn.ModuleList)]
    return [block for part in lists for block in part]


def _first_block_cache_fits(blocks: list[nn.Module]) -> bool:
    """Whether diffusers knows all blocks, and the first and the last give as many tensors, which it subtracts.

    Those of FLUX.2 do not: diffusers 0.42.1 ends there in a TypeError.
    """
    registry: Any = importlib.import_module("diffusers.hooks._helpers").TransformerBlockRegistry
    try:
        ends = [registry.get(type(block)).return_encoder_hidden_states_index is None for block in blocks]
    except ValueError:
        return False
    return len(blocks) > 1 and ends[0] == ends[-1]


def _with_first_block_cache(
    view: Any, blocks: list[nn.Module], threshold: float, num_inference_steps: int, work: Work
) -> Any:
    for block in blocks:  # below the cache's own hooks, so that a block is counted where it runs
        hook_on(block, _BlockHook(work), _COUNT)
    view.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    hook_on(view, _FirstBlockHook(num_inference_steps, work, len(blocks)), _HOOK)
    return view


class _BlockHook(RunHook):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._work.blocks_computed += 1
        return self.original(*args, **kwargs)


class _FirstBlockHook(RunHook):
    """Tells diffusers' cache which side of guidance a call is for, as not all of its pipelines do, and counts."""

    _is_stateful = True

    def __init__(self, num_inference_steps: int, work: Work, blocks: int) -> None:
        super().__init__()
        self._work, self._blocks = work, blocks
        self._branches = GuidanceBranches(partial(next, count()), num_inference_steps)

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        work = self._work
        branch, _ = self._branches.enter(call_of(module, args, kwargs))
        before = work.blocks_computed
        with module.cache_context(f"guidance branch {branch}"):
            output = self.original(*args, **kwargs)
        ran = work.blocks_computed - before
        work.blocks_skipped += self._blocks - ran
        work.steps_computed += ran == self._blocks
        work.steps_from_cache += ran < self._blocks
        self._branches.leave(branch)
        if self._branches.over:
            module._reset_stateful_cache()
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self._branches.clear()
        return module
