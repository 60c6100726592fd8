"""DeepCache: the deep blocks of a UNet are computed every few steps, and remembered in between (arXiv 2312.00858)."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .guidance_branches import GuidanceBranches, call_of
from .run_hooks import RunHook, hook_on, run_view
from .work import Work

FEWEST_STEPS = 5
POWER = 1.4
_HOOK = "duet_unet_cache"
_DOWN, _UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")


def with_unet_cache(
    unet: Any, interval: int, num_inference_steps: int, work: Work, depth: int = 1, power: float = POWER
) -> Any:
    """A private view of ``unet``, a UNet2DConditionModel, for one run: all of it is computed every ``interval`` steps.

    In between only the layers around the outermost ``depth`` skip connections run, on what the rest gave to them at the
    last whole step; with a depth of 1 that is the first convolution and the last layer of the last up block. interval
    1 computes everything. power: 1 for even intervals, more for closer ones at the beginning, as many in all; 1.4
    measured better than 1 on trained weights (see docs/caches-of-steps.md). num_inference_steps: of the run, as often
    as each side of guidance is called; after the last one nothing is held. Both sides are kept apart, whether they come
    as one doubled batch or in calls of their own.
    Raises ValueError for four steps or fewer, where nothing is saved that is worth its loss, for blocks that are
    unknown, and, when called, for the residuals of a ControlNet or a T2I-Adapter.
    """
    if interval < 1:
        raise ValueError(f"expected an interval of the UNet cache of 1 or more steps, got {interval}")
    if interval > 1 and num_inference_steps < FEWEST_STEPS:
        raise ValueError(
            f"expected {FEWEST_STEPS} steps or more for a UNet cache, since each of a few steps is too far from the "
            f"one before it; got {num_inference_steps}"
        )
    if not power >= 1:
        raise ValueError(f"expected a power of the UNet cache's intervals of 1 or more, got {power}")
    _check_blocks(unet)
    view = run_view(unet)
    most = sum(len(block.resnets) for block in view.up_blocks)
    if not 1 <= depth <= most:
        raise ValueError(f"expected a depth of the UNet cache of 1 to {most} skip connections, got {depth}")
    run = _Run(
        GuidanceBranches(_Remembered, num_inference_steps), work, whole_steps(num_inference_steps, interval, power)
    )
    blocks = len(view.down_blocks) + len(view.up_blocks) + (view.mid_block is not None)
    if interval > 1:
        run.skipped = _hook_blocks(view, run, depth)
    hook_on(view, _UNetHook(run, blocks), _HOOK)
    return view


def whole_steps(num_inference_steps: int, interval: int, power: float = POWER) -> frozenset[int]:
    """Which steps are computed whole: as many as every ``interval`` steps would be, the first among them.

    power: 1 or more, as in the paper's non-uniform intervals, whose centre is the beginning here.
    """
    if power == 1:
        return frozenset(range(0, num_inference_steps, interval))
    many = -(-num_inference_steps // interval)
    found: list[int] = []
    for number in range(many):
        step = round(num_inference_steps * (number / many) ** power)
        found.append(max(step, found[-1] + 1) if found else 0)
    return frozenset(found)


@dataclass
class _Remembered:
    """What the deep blocks gave at the last whole step: the first kept layer's input, None before there is one."""

    features: Tensor | None = None


@dataclass
class _Run:
    """What the hooks of one view share. whole: whether this call computes everything; state: of its branch."""

    branches: GuidanceBranches[_Remembered]
    work: Work
    whole_steps: frozenset[int]
    skipped: int = 0
    whole: bool = True
    state: _Remembered = field(default_factory=_Remembered)


class _UNetHook(RunHook):
    """Around the whole UNet: decides what a call computes, and counts it."""

    _is_stateful = True

    def __init__(self, run: _Run, blocks: int) -> None:
        super().__init__()
        self._run, self._blocks = run, blocks

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run, work = self._run, self._run.work
        run.state, step = run.branches.enter(call_of(module, args, kwargs))
        run.whole = step in run.whole_steps or run.state.features is None
        output = self.original(*args, **kwargs)
        skipped = 0 if run.whole else run.skipped
        work.steps_computed += run.whole
        work.steps_from_cache += not run.whole
        work.blocks_computed += self._blocks - skipped
        work.blocks_skipped += skipped
        run.branches.leave(run.state)
        run.state = _Remembered()
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self._run.branches.clear()
        self._run.state = _Remembered()
        return module


class _DownHook(RunHook):
    """A down block of which the first layers, ``head``, run in between, or none where it is None.

    skips: how many tensors it hands over to the up blocks.
    """

    def __init__(self, run: _Run, skips: int, head: Any) -> None:
        super().__init__()
        self._run, self._skips, self._head = run, skips, head

    def new_forward(self, module: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._run.whole:
            return self.original(hidden_states, *args, **kwargs)
        skips: tuple[Tensor, ...] = ()
        if self._head is not None:
            hidden_states, skips = self._head(hidden_states, *args, **kwargs)
        # The UNet counts what it hands on to the up blocks. Those that would take these do not run.
        return hidden_states, skips + (hidden_states,) * (self._skips - len(skips))


class _MidHook(RunHook):
    def __init__(self, run: _Run) -> None:
        super().__init__()
        self._run = run

    def new_forward(self, module: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.original(hidden_states, *args, **kwargs) if self._run.whole else hidden_states


class _UpHook(RunHook):
    """An up block of which the last layers, ``tail``, run in between, or none where it is None.

    On a whole step it runs as its two parts, ``head`` and ``tail``, so that what lies between them can be kept.
    """

    def __init__(self, run: _Run, head: Any, tail: Any) -> None:
        super().__init__()
        self._run, self._head, self._tail = run, head, tail

    def new_forward(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        run = self._run
        if self._tail is None:
            if not run.whole:
                return hidden_states
            return self.original(hidden_states, res_hidden_states_tuple, *args, **kwargs)
        kept = len(self._tail.resnets)
        if run.whole:
            if self._head is not None:
                hidden_states = self._head(hidden_states, res_hidden_states_tuple[kept:], *args, **kwargs)
            run.state.features = hidden_states
        else:
            assert run.state.features is not None, "a step before any whole one"
            hidden_states = run.state.features
        return self._tail(hidden_states, res_hidden_states_tuple[:kept], *args, **kwargs)


def _check_blocks(unet: Any) -> None:
    if type(unet).__name__ != "UNet2DConditionModel":
        raise ValueError(f"expected a UNet2DConditionModel for a UNet cache, got {type(unet).__name__}")
    for known, blocks in ((_DOWN, unet.down_blocks), (_UP, unet.up_blocks)):
        unknown = next((block for block in blocks if type(block).__name__ not in known), None)
        if unknown is not None:
            raise ValueError(
                f"expected blocks of {' or '.join(known)} for a UNet cache, got {type(unknown).__name__}, whose layers "
                "lie differently"
            )


def _hook_blocks(view: Any, run: _Run, depth: int) -> int:
    """Hooks on all blocks but those that always run; gives how many blocks do not run at all in between."""
    skipped = 0
    left = depth - 1  # the outermost skip is the first convolution's
    for block in view.down_blocks:
        skips = len(block.resnets) + (block.downsamplers is not None)
        if left < skips:
            head = _layers(block, slice(left), downsamplers=None) if left else None
            hook_on(block, _DownHook(run, skips, head), _HOOK)
            skipped += not left
        left = max(0, left - skips)
    if view.mid_block is not None:
        hook_on(view.mid_block, _MidHook(run), _HOOK)
        skipped += 1
    left = depth
    for block in reversed(view.up_blocks):
        layers = len(block.resnets)
        if left > layers:  # all of it runs, and the features lie further in
            left -= layers
            continue
        inner = layers - left
        head = _layers(block, slice(inner), upsamplers=None) if left and inner else None
        hook_on(block, _UpHook(run, head, _layers(block, slice(inner, None)) if left else None), _HOOK)
        skipped += not left
        left = 0
    return skipped


def _layers(block: Any, kept: slice, **changed: None) -> Any:
    """Another block of the same class around some of the very same layers, with or without what comes after them."""
    part = object.__new__(type(block))
    part.__dict__.update(vars(block))
    part.__dict__["_modules"] = dict(block._modules)
    for name in ("resnets", "attentions"):
        if name in part._modules:
            part._modules[name] = nn.ModuleList(list(block._modules[name])[kept])
    part._modules.update(changed)
    return part
