"""Weights that are laid over a model for one run, such as a LoRA. The module in the cache is never changed.

What an adapter changes is a private view of the module: other submodules around the very same parameters. So there is
nothing to undo, whatever ends the run, and two runs at a time never see each other's adapters.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .files.components import Component
from .files.safetensors_files import read_json
from .model_cache import ModelCache


class Adapter(Protocol):
    """What is recorded on a checkpoint. It holds no weights: they lie in the cache, as a model of their own."""

    @property
    def identity(self) -> tuple[object, ...]:
        """All that decides what it does, as the store of embeddings takes it."""
        ...

    def acts_on(self, component: str) -> bool: ...

    def shown(self) -> tuple[Tensor, Tensor] | None:
        """What the denoiser is to be shown besides the words, and in place of it where it steers away; or None."""
        ...

    def use(self, cache: ModelCache, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """Its weights: on the cache's device, and pinned, while in the block."""
        ...

    def lay_over(self, component: str, view: nn.Module, weights: Any) -> None:
        """Change ``view``, which belongs to the caller. ``weights`` outlive it."""
        ...


@contextmanager
def adapted(
    module: AbstractContextManager[Any],
    cache: ModelCache,
    adapters: Sequence[Adapter],
    component: str,
    dtype: torch.dtype,
) -> Iterator[nn.Module]:
    """A view of ``module`` with the adapters on it, in their order; all of them pinned while in the block."""
    with ExitStack() as stack:
        view = private_view(stack.enter_context(module))
        for adapter in adapters:
            adapter.lay_over(component, view, stack.enter_context(adapter.use(cache, dtype)))
        yield view


def pictures_shown(
    adapters: Sequence[Adapter], component: str, place: Any, batch: int
) -> tuple[list[Tensor], list[Tensor]] | None:
    """What all adapters have to show to ``component``, one tensor (batch, ...) for each, and in place of it.

    place: the module, for its device and dtype.
    """
    shown = [adapter.shown() for adapter in adapters if adapter.acts_on(component)]
    pairs = [pair for pair in shown if pair is not None]
    if not pairs:
        return None

    def placed(side: Tensor) -> Tensor:
        return side.to(place.device, place.dtype).expand(batch, *side.shape[1:])

    return [placed(embeds) for embeds, _ in pairs], [placed(negative) for _, negative in pairs]


def private_view(module: nn.Module) -> Any:
    """A module of the same submodules, parameters and buffers, whose own hooks and parts may be changed freely.

    Costs no weights: the parameters are the same objects, so they must stay where they are while the view is in use.
    """
    return _view(module, {})


def _view(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:  # two names of one submodule stay so
        return seen[id(module)]
    assert "forward" not in vars(module), "a forward that was replaced would run the module that is viewed"
    view = object.__new__(type(module))
    seen[id(module)] = view
    # Tables of parameters, buffers, hooks and the like; anything else is shared as it is.
    tables = (dict, set)
    view.__dict__.update(
        {name: _copied(held) if isinstance(held, tables) else held for name, held in vars(module).items()}
    )
    view.__dict__["_compiled_call_impl"] = None  # it would run the module that is viewed
    for name, part in module._modules.items():
        view._modules[name] = None if part is None else _view(part, seen)
    return view


def _copied(held: Any) -> Any:
    # Of subclasses, such as a configuration, which are never changed in place, only the plain tables are copied.
    return held.copy() if type(held).__module__ in ("builtins", "collections") else held


def skeleton(part: Component) -> Any:
    """The component's module without weights, on the meta device: to look at its names and shapes."""
    config = read_json(part.config) | dict(part.options)
    made = part.load_class()
    with torch.device("meta"):
        if part.library == "transformers":
            return made(made.config_class.from_dict(config))
        return made.from_config(config)
