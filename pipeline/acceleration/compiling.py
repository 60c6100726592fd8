"""torch.compile around parts of a denoiser, kept between runs, and never in the way of one.

torch keeps what it compiled with the code that ran, behind guards on what it saw there: classes, shapes, hooks. Weights
are inputs of it. So every private view of every model of a class finds it again, and nothing of a view is kept.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as remembered
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..residency import is_out_of_memory

log = logging.getLogger(__name__)

# Widths, batch sizes and kinds of adapter of one class of block; torch's own limit of 8 is for one model in a script.
_MOST_VARIANTS = 64
_QUOTED = 200


@dataclass(frozen=True)
class Compilation:
    """What ``compile_view`` laid over a view. regions: how many parts are compiled; whole: it is one, the denoiser."""

    regions: int
    whole: bool
    _kinds: tuple["_Region", ...]

    def notices(self) -> tuple[str, ...]:
        """To be asked after the run: what was not compiled after all, and why."""
        return tuple(f"not compiled: {kind.failure}" for kind in self._kinds if kind.failure)


def compile_view(view: Any, how: str) -> Compilation:
    """Have a denoiser run compiled. ``view`` is changed, so it must be the caller's own (``private_view``), and the one
    that is called: a view of it is not compiled. Adapters and other hooks may lie on it already.

    how: "regions" compiles the blocks that repeat (``repeated_blocks``), or the whole where there are none. "cuda
    graphs" compiles the whole and records it as a CUDA graph. The first run of a kind takes from seconds to minutes;
    torch keeps the code on disk too. Another LoRA of the same layers, another strength, rank, batch or size is found
    compiled, after one more time for each of these that changes for the first time. Where the compiler is missing or
    fails, the part runs as it did without, with a warning, and is not tried again in this process.
    Raises ValueError for CUDA graphs without CUDA, and for a whole whose ``forward`` is replaced, as a UNet cache does.
    """
    if how not in ("regions", "cuda graphs"):
        raise ValueError(f"expected to compile by regions or cuda graphs, got {how!r}")
    graphs = how == "cuda graphs"
    device = next(view.parameters()).device
    if graphs and device.type != "cuda":
        raise ValueError(f"expected an NVIDIA GPU for CUDA graphs, got {device.type}: choose to compile by regions")
    parts = [] if graphs else repeated_blocks(view)
    whole = not parts
    if whole and "forward" in vars(view):
        raise ValueError(f"expected a {type(view).__name__} that runs whole to compile it whole, got one with a cache")
    for module in view.modules():
        _make_steady(module)
    kinds = {_lay_on(part, graphs) for part in parts}
    if whole:  # its forward alone, so that hooks on the whole, such as one that counts, are no part of the program
        kind = _region(type(view), True, graphs)
        view.forward = partial(kind, view)
        kinds.add(kind)
    return Compilation(max(1, len(parts)), whole, tuple(kinds))


def _lay_on(block: Any, graphs: bool) -> "_Region":
    hooks = getattr(block, "_diffusers_hook", None)
    if hooks is None or not hooks._fn_refs:
        kind = _region(type(block), False, graphs)
        block._compiled_call_impl = partial(kind, block)
        return kind
    # Hooks of a step cache took the place of its forward. They count steps, and would be another program at each; so
    # what the innermost of them calls is compiled, which is the block's own.
    kind = _region(type(block), True, graphs)
    innermost = hooks._fn_refs[0]
    name = "forward" if innermost.original_forward is None else "original_forward"
    setattr(innermost, name, partial(kind, block))
    return kind


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks that diffusers names for its class, else all members of the module's own lists."""
    names = getattr(type(module), "_repeated_blocks", ())
    if names:
        return [part for part in module.modules() if type(part).__name__ in names]
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    return [part for each in lists for part in each]


def _make_steady(module: nn.Module) -> None:
    """Numbers that a hook was made with become tensors, and parameters plain ones, whose sizes may vary.

    A number is a constant to the compiler, so that another strength of a LoRA would be another program.
    """
    for number, hook in module._forward_hooks.items():
        if isinstance(hook, partial):
            place = next((value.device for value in hook.args if isinstance(value, Tensor)), torch.device("cpu"))
            with torch.inference_mode(False):
                values = [_steady(value, place) for value in hook.args]
            module._forward_hooks[number] = partial(hook.func, *values, **hook.keywords)


def _steady(value: Any, device: torch.device) -> Any:
    if isinstance(value, float):
        return torch.tensor(value, device=device)
    return value.detach() if isinstance(value, Tensor) else value


class _Region:
    """All parts of one class. A code object of its own, so that its variants count against no other class."""

    def __init__(self, kind: type, whole: bool, graphs: bool) -> None:
        import torch._dynamo  # seconds to import, and only needed here

        def run_block(part: nn.Module, *arguments: Any, **options: Any) -> Any:
            return part._call_impl(*arguments, **options)

        def run_whole(part: nn.Module, *arguments: Any, **options: Any) -> Any:
            return kind.forward(part, *arguments, **options)

        run = run_whole if whole else run_block
        run.__code__ = run.__code__.replace(co_name=f"{run.__name__}_{kind.__name__}")
        self.failure = ""
        self._name = kind.__name__
        self._graphs = graphs
        self._plain: Callable[..., Any] = run
        self._compiled: Callable[..., Any] = torch.compile(run, mode="reduce-overhead" if graphs else None)
        # torch does not look at hooks otherwise, and would run a view without the LoRA that lies on it.
        self._settings = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, recompile_limit=_MOST_VARIANTS)

    def __call__(self, part: nn.Module, *arguments: Any, **options: Any) -> Any:
        if self.failure:
            return self._plain(part, *arguments, **options)
        from torch._dynamo.exc import TorchDynamoException

        try:
            with self._settings:
                if not self._graphs:
                    return self._compiled(part, *arguments, **options)
                torch.compiler.cudagraph_mark_step_begin()
                # The graph writes its next output to the same place, while a scheduler may remember this one.
                return _cloned(self._compiled(part, *arguments, **options))
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            if is_out_of_memory(cause):
                raise
            said = str(cause).strip().partition("\n")[0][:_QUOTED]
            self.failure = f"{self._name} ({type(cause).__name__}: {said})"
            log.warning("torch.compile failed, so %s runs as it is", self.failure)
        return self._plain(part, *arguments, **options)


@remembered
def _region(kind: type, whole: bool, graphs: bool) -> _Region:
    """One for the process: what torch compiled lies with its code object."""
    return _Region(kind, whole, graphs)


def _cloned(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, dict):  # diffusers' outputs are ordered dictionaries with attributes
        return type(output)(**{name: _cloned(value) for name, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(_cloned(value) for value in output)
    return output
