"""A diffusers folder or single file -> validated components. Offline; classes from an allow-list; safetensors only."""

import copy
import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from .families import FAMILIES
from .family import Family
from .files.components import Component, check_model, either, open_component
from .files.content import Digests, effective
from .files.safetensors_files import CheckpointError, check_weights, read_json, shown
from .files.single_file import open_single_file
from .files.single_file_weights import build
from .files.weights import key_of
from .model_cache import ModelCache, ModelKey
from .private_views import Adapter, adapted
from .residency import is_out_of_memory

__all__ = ["Checkpoint", "CheckpointError", "Component", "open_checkpoint"]

# Parts of common folders that Duet has no use for.
_IGNORED = {"feature_extractor", "processor", "safety_checker"}

# from_pretrained changes torch's default dtype, and its initialisers, for the whole process while it runs.
building = threading.Lock()

# What the libraries raise on files that are not what they should be.
LOADING_ERRORS = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)
_QUOTED = 300  # characters of theirs that our error repeats; they may list every tensor


@dataclass(frozen=True)
class Checkpoint:
    """A folder or single file whose every component was found whole when it was opened. Holds no weights.

    folder: or the single file; identity: its name and a digest of the weights, which says the same on every machine;
    index: the model_index.json, which ships with the pack for a single file. adapters: what is laid over it in use.
    """

    folder: Path
    family: Family
    components: Mapping[str, Component]
    identity: str
    index: Path
    adapters: tuple[Adapter, ...] = ()
    digests: Digests = field(default_factory=Digests, repr=False, compare=False)
    _keys: dict[tuple[str, torch.dtype], tuple[Any, ModelKey]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _configs: dict[str, tuple[Any, Mapping[str, Any]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _tokenizers: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _schedulers: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def has(self, component: str) -> bool:
        return component in self.components

    def identity_of(self, component: str) -> str:
        """For ``Space.model``: which weights made an embedding. The same folder with other weights says otherwise."""
        return f"{self.folder.name}/{component}@{self._component(component).digest[:8]}"

    def key(self, component: str, dtype: torch.dtype | None = None) -> ModelKey:
        """The component as it lies on disk now, equal for equal weights anywhere. dtype: float32 unless given.

        Reads all its weights the first time; see ``Digests``.
        """
        part = self._component(component)
        if not part.weights:
            raise CheckpointError(f"{part.folder}: expected a component with weights, found a {part.class_name}")
        dtype = dtype or torch.float32
        # Several times in each run: while all files are the very same, so is the key.
        lies = _status((part.config, *part.weights))
        known = self._keys.get((component, dtype))
        if known is not None and known[0] == lies:
            return known[1]
        key = replace(key_of(part.weights, component, dtype, self.digests.of(part)), class_name=part.class_name)
        if lies is not None:
            self._keys[component, dtype] = lies, key
        return key

    def config(self, component: str) -> Mapping[str, Any]:
        """By what the component's class makes it, defaults included: the ``config`` of its module, without weights."""
        part = self._component(component)
        lies = _status((part.config,))
        known = self._configs.get(component)
        if known is None or known[0] != lies:
            told = read_json(part.config) | dict(part.options)
            known = self._configs[component] = lies, effective(part.library, part.class_name, told)
        return known[1]

    def build(self, component: str, dtype: torch.dtype | None = None) -> nn.Module:
        """Read the component's weights to the CPU, in eval mode and without gradients. dtype: float32 unless given.

        The parameters are ordinary tensors even where the caller is in inference mode, and share nothing with the file.
        Raises CheckpointError if the weights are not those of the component's class.
        """
        part = self._component(component)
        check_model(part.config, part.weights)  # again: they may have been replaced since the folder was opened
        try:
            with building, torch.inference_mode(False):
                by_diffusers = part.library in ("diffusers", "duet")
                build_part = build if part.form or by_diffusers or _in_integers(part) else _from_pretrained
                module = build_part(part, dtype or torch.float32)
                own(module)
        except (*LOADING_ERRORS, SafetensorError) as error:
            if is_out_of_memory(error) or isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{part.where}: expected weights of a {part.class_name}, got: {str(error)[:_QUOTED]}"
            ) from error
        return module.eval().requires_grad_(False)

    def use(self, cache: ModelCache, component: str, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
        """``with checkpoint.use(cache, "unet") as unet:`` - on the cache's device, and pinned, while in the block.

        dtype: unless given, float32 on a CPU and the family's own on any other device.
        """
        dtype = self._dtype(cache, dtype)
        module = cache.use(self.key(component, dtype), lambda: self.build(component, dtype))
        return self._adapted(module, cache, component, dtype)

    def altered_key(self, component: str, how: str, dtype: torch.dtype) -> ModelKey:
        """Of the same weights held in another way: equal for equal weights and equal ways."""
        key = self.key(component, dtype)
        content = hashlib.sha256(f"{key.content} {how}".encode()).hexdigest()
        return replace(key, component=f"{component} in {how}", content=content)

    def use_altered(
        self,
        cache: ModelCache,
        component: str,
        how: str,
        build: Callable[[torch.dtype], nn.Module],
        dtype: torch.dtype | None = None,
    ) -> AbstractContextManager[Any]:
        """As ``use``, of the weights held in another way, which is an entry of its own in the cache.

        how: names the way; build: makes it on the CPU, in the dtype that it is told.
        """
        dtype = self._dtype(cache, dtype)
        module = cache.use(self.altered_key(component, how, dtype), lambda: build(dtype))
        return self._adapted(module, cache, component, dtype)

    def _dtype(self, cache: ModelCache, dtype: torch.dtype | None) -> torch.dtype:
        return dtype or (torch.float32 if cache.residency.device.type == "cpu" else self.family.device_dtype)

    def _adapted(
        self, module: AbstractContextManager[Any], cache: ModelCache, component: str, dtype: torch.dtype
    ) -> AbstractContextManager[Any]:
        acting = [adapter for adapter in self.adapters if adapter.acts_on(component)]
        return adapted(module, cache, acting, component, dtype) if acting else module

    def with_adapter(self, adapter: Adapter) -> "Checkpoint":
        """The same model with one more laid over it, after those that it has."""
        return replace(self, adapters=(*self.adapters, adapter))

    def tokenizer(self, component: str = "tokenizer") -> Any:
        """Read once; it keeps no state between calls."""
        if component not in self._tokenizers:
            part = self._component(component)
            self._tokenizers[component] = _read(part, part.load_class().from_pretrained)
        return self._tokenizers[component]

    def scheduler(self) -> Any:
        """A fresh one for each run, because a scheduler counts its steps; read once, and copied."""
        if not self._schedulers:
            part = self._component("scheduler")
            self._schedulers["scheduler"] = _read(part, part.load_class().from_pretrained)
        return fresh_scheduler(self._schedulers["scheduler"])

    def _component(self, name: str) -> Component:
        if name not in self.components:
            raise CheckpointError(f"{self.folder}: expected a component {name!r}, found {', '.join(self.components)}")
        return self.components[name]


def open_checkpoint(
    path: Path, further: Sequence[Path] = (), config: Path | None = None, digests: Digests | None = None
) -> Checkpoint:
    """Check a diffusers folder, or a single file, by its JSON and the headers of its weights.

    further: for a single file that holds no text encoder or VAE, the files that do; config: for a single file, a folder
    of configurations in place of those that ship; digests: what remembers the contents of weights, so that they are
    not read again to be told apart. Raises CheckpointError, naming the file.
    """
    if path.suffix == ".safetensors" and not path.is_dir():
        single = open_single_file(path, further, config)
        return _checkpoint(path, single.family, single.components, single.index, digests)
    if not path.is_dir():
        raise CheckpointError(
            f"expected a folder with a model_index.json, or a .safetensors file, at {path}, found no such folder"
        )
    if further:
        raise CheckpointError(f"{path} is a folder, which is used whole: expected no {further[0].name} beside it")
    index_path = path / "model_index.json"
    index = read_json(index_path)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise CheckpointError(f"{index_path}: expected a {either(FAMILIES)}, found {shown(pipeline)}")
    family = FAMILIES[pipeline]
    components = {
        name: open_component(index_path, name, entry)
        for name, entry in index.items()
        if isinstance(entry, list) and entry != [None, None] and name not in _IGNORED
    }
    for name in family.components:
        if name not in components:
            raise CheckpointError(f"{index_path}: expected a component {name!r} for a {family.name} model, found none")
    return _checkpoint(path, family, components, index_path, digests)


def _checkpoint(
    path: Path, family: Family, components: Mapping[str, Component], index: Path, digests: Digests | None
) -> Checkpoint:
    digest = hashlib.sha256("".join(f"{name}{components[name].digest}" for name in sorted(components)).encode())
    identity = f"{path.name}@{digest.hexdigest()[:12]}"
    return Checkpoint(path, family, components, identity, index, digests=digests or Digests())


def _from_pretrained(part: Component, dtype: torch.dtype) -> nn.Module:
    """A folder of transformers, which makes a network without memory first and knows all its older names."""
    module, report = part.load_class().from_pretrained(
        str(part.folder),
        use_safetensors=True,
        local_files_only=True,
        variant=part.variant,
        output_loading_info=True,
        dtype=dtype,
    )
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise CheckpointError(
            f"{part.folder}: expected the weights of a {part.class_name}; {len(lacking)} are missing or of another "
            f"shape, the first being {lacking[0]}"
        )
    return module


def _in_integers(part: Component) -> bool:
    """Whether rows of it are to be multiplied out, of which transformers knows nothing."""
    return any(entry.dtype == "I8" for path in part.weights for entry in check_weights(path).entries.values())


def fresh_scheduler(scheduler: Any) -> Any:
    """A copy that shares nothing with it but the configuration, which is never changed in place.

    What ``copy.deepcopy`` gives, in a fraction of the time, since it need not take storages of tensors apart.
    """
    held = vars(scheduler).values()
    known: dict[int, Any] = {id(each): each.clone() for each in held if isinstance(each, torch.Tensor)}
    return copy.deepcopy(scheduler, known | {id(scheduler.config): scheduler.config})


def _status(paths: Sequence[Path]) -> list[tuple[int, ...]] | None:
    """What changes as soon as one of them is another file, or written to; None where one is not there."""
    try:
        stats = [os.stat(path) for path in paths]
    except OSError:
        return None
    return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]


def _read(part: Component, from_pretrained: Any) -> Any:
    try:
        return from_pretrained(str(part.folder), local_files_only=True, **part.options)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{part.folder}: expected a {part.class_name}, got: {str(error)[:_QUOTED]}") from error


def own(module: nn.Module) -> None:
    """Copy what is still mapped from the file: overwriting it would change the weights, or end the process."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()
