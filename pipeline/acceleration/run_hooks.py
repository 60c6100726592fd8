"""Hooks of diffusers on a denoiser's private view, for one run."""

from typing import Any

from diffusers.hooks import HookRegistry, ModelHook

from ..private_views import private_view


class RunHook(ModelHook):
    """In place of a module's forward."""

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the module did before the hook was laid on."""
        reference: Any = self.fn_ref
        return reference.original_forward(*args, **kwargs)


def run_view(module: Any) -> Any:
    """A private view; the module itself where a hook runs in place of its forward, since then it is a view already."""
    if "forward" in vars(module):
        return module
    view = private_view(module)
    for part in view.modules():
        # Pipelines leave a registry on a transformer even where there is no hook. It belongs to what is viewed.
        vars(part).pop("_diffusers_hook", None)
    return view


def hook_on(module: Any, hook: ModelHook, name: str) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
