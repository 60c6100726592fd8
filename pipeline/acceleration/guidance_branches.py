"""Which of a step's calls of the denoiser is made: what is steered towards and what is steered away from stay apart."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

State = TypeVar("State")
_MOST_BRANCHES = 8  # far more than guidance has; a condition that changes with every step would else pile up
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
)
_SAMPLE, _TIMESTEP = ("sample", "hidden_states"), "timestep"


@dataclass(frozen=True)
class Call:
    """What a denoiser of diffusers is called with. condition: all but the sample and the time, by name."""

    sample: Tensor
    timestep: Any
    condition: Mapping[str, Any]


def check_told(denoiser: nn.Module) -> None:
    """Raises ValueError for a denoiser of other arguments than ``call_of`` knows."""
    names = _names(type(denoiser))
    if _TIMESTEP not in names or not any(name in names for name in _SAMPLE):
        raise ValueError(
            f"expected a denoiser that is told a {' or '.join(_SAMPLE)} and a {_TIMESTEP} for a cache of steps, got "
            f"{type(denoiser).__name__}, which is told {', '.join(names)}"
        )


def call_of(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Raises ValueError for what a ControlNet or a T2I-Adapter adds."""
    said = dict(zip(_names(type(denoiser)), args, strict=False)) | dict(kwargs)
    sample = next(said.pop(name) for name in _SAMPLE if name in said)
    timestep = said.pop(_TIMESTEP)
    if any(said.get(name) is not None for name in _RESIDUALS):
        raise ValueError(
            "expected no ControlNet and no T2I-Adapter together with a cache of steps, which would pass over what they "
            "add at each step; got residuals of one"
        )
    return Call(sample, timestep, said)


@dataclass
class _Branch(Generic[State]):
    """steps: before this one; in_step, most: calls in this step, and in the fullest so far; over: all are done."""

    condition: tuple[object, ...]
    state: State
    steps: int
    timestep: object
    sample: Tensor
    in_step: int = 1
    most: int = 1
    over: bool = False


@functools.cache  # of hundreds of microseconds, at each step
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


class GuidanceBranches(Generic[State]):
    """One state for each condition that the denoiser is called with, from its first step to its last.

    A branch is known by all that it is told besides the sample and the time, such as ``encoder_hidden_states``: by
    identity, else by value. So guidance may be one call of a doubled batch, two calls, or more, in any order. After
    ``num_inference_steps`` steps the branch's state is dropped, and the next call begins a new run.
    """

    def __init__(self, make: Callable[[], State], num_inference_steps: int) -> None:
        self._make = make
        self._steps = num_inference_steps
        self._branches: list[_Branch[State]] = []

    def enter(self, call: Call) -> tuple[State, int]:
        """The state of the call's branch, and the number of its step, from 0."""
        said = tuple(_leaves(call.condition))
        sample, timestep, shape = call.sample, call.timestep, call.sample.shape
        found = next((one for one in self._branches if one.sample.shape == shape and _alike(one.condition, said)), None)
        if found is None:
            found = _Branch(said, self._make(), 0, timestep, sample)
            self._branches = [*self._branches[1 - _MOST_BRANCHES :], found]
        elif _same_step(found, sample, timestep):
            found.in_step += 1
            found.most = max(found.most, found.in_step)
        else:
            found.steps = 0 if found.over else found.steps + 1
            found.in_step, found.over = 1, False
        found.timestep, found.sample = timestep, sample
        return found.state, found.steps

    def leave(self, state: State) -> None:
        """At the end of a call: drops what is held for its branch where the step was the last one."""
        for one in self._branches:
            if one.state is state and one.steps + 1 >= self._steps and one.in_step == one.most:
                one.state, one.over = self._make(), True

    @property
    def over(self) -> bool:
        """Whether each branch has had its last step."""
        return all(one.over for one in self._branches)

    def clear(self) -> None:
        self._branches = []


def _same_step(branch: _Branch[Any], sample: Tensor, timestep: object) -> bool:
    # Two sides of guidance that are told the same: the loop hands both the very same timestep. A number may be the
    # same object by chance, so only a tensor tells.
    return isinstance(timestep, Tensor) and timestep is branch.timestep and torch.equal(sample, branch.sample)


def _leaves(value: Any) -> Iterator[object]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield key
            yield from _leaves(value[key])
    elif isinstance(value, list | tuple):
        yield len(value)
        for part in value:
            yield from _leaves(part)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _leaves({field.name: getattr(value, field.name) for field in fields(value)})
    else:
        yield value


def _alike(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(one: object, other: object) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_kind = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return same_kind and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
