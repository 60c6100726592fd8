"""One component of a checkpoint: which class it may be, and which files it is made of."""

import hashlib
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .safetensors_files import CheckpointError, check_weights, read_json, shard_names, shown

# What a folder may ask for, by library. Anything else is refused: or a file would choose which code runs.
_MODELS = {
    "diffusers": {
        "AutoencoderDC",
        "AutoencoderKL",
        "AutoencoderKLFlux2",
        "AutoencoderKLQwenImage",
        "AutoencoderTiny",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "HunyuanDiT2DModel",
        "PixArtTransformer2DModel",
        "QwenImageTransformer2DModel",
        "SanaTransformer2DModel",
        "SD3Transformer2DModel",
        "Transformer2DModel",
        "UNet2DConditionModel",
        "ZImageTransformer2DModel",
    },
    "transformers": {
        "BertModel",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "CLIPVisionModelWithProjection",
        "Gemma2ForCausalLM",
        "Gemma2Model",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3Model",
        "ResNetModel",
        "SiglipVisionModel",
        "T5EncoderModel",
    },
    "kolors": {"ChatGLMModel"},
    "duet": {"FusionNetwork"},
}
_TOKENIZERS = {
    "transformers": {
        "BertTokenizer",
        "BertTokenizerFast",
        "CLIPTokenizer",
        "CLIPTokenizerFast",
        "GemmaTokenizer",
        "GemmaTokenizerFast",
        "PreTrainedTokenizerFast",
        "Qwen2Tokenizer",
        "Qwen2TokenizerFast",
        "T5Tokenizer",
        "T5TokenizerFast",
    },
    "kolors": {"ChatGLMTokenizer"},
}
_SCHEDULERS = {
    "diffusers": {
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SCMScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    }
}
# Libraries of model_index.json that are no top-level package: where their classes are.
_MODULES = {
    "duet": {"FusionNetwork": ("..fusing.fusion_network", __package__)},
    "kolors": {
        "ChatGLMModel": ("diffusers.pipelines.kolors.text_encoder", None),
        "ChatGLMTokenizer": ("diffusers.pipelines.kolors.tokenizer", None),
    },
}
# The files that a tokenizer may be made of: one of these sets.
_TOKENIZER_FILES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
    ("vocab.txt",),
)

_MOST_TRAIN_STEPS = 100_000
# A configuration's numbers that are widths of its network, which is made before its weights are seen not to fit. The
# widest dimension of published models is a vocabulary's.
_WIDTH = re.compile(r"dim|channels|hidden_size|intermediate_size|vocab_size|width|d_model|d_ff|d_kv|remembers")
_WIDEST = 2**18


@dataclass(frozen=True)
class Component:
    """One part of a checkpoint. config: its JSON file; weights: its files, none for a tokenizer or a scheduler.

    variant: the infix of the weights' names, such as "fp16"; digest: of all its weights files. form: in a single file,
    the layout of its tensors, of which all names begin with ``prefix``; options: what replaces or adds to the
    configuration.
    """

    name: str
    library: str
    class_name: str
    config: Path
    weights: tuple[Path, ...] = ()
    variant: str | None = None
    digest: str = ""
    form: str = ""
    prefix: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> Path:
        """For an error: the folder of the component, or the single file that holds it."""
        return self.weights[0] if self.form else self.folder

    @property
    def folder(self) -> Path:
        return self.config.parent

    def load_class(self) -> Any:
        return load_class(self.library, self.class_name)


def load_class(library: str, class_name: str) -> Any:
    """A class that model_index.json names; its library is imported only now."""
    module, package = _MODULES.get(library, {}).get(class_name, (library, None))
    return getattr(importlib.import_module(module, package), class_name)


def open_component(index: Path, name: str, entry: list[Any]) -> Component:
    """A component named in ``index``, a model_index.json, as [library, class]. Raises CheckpointError."""
    if not name.isidentifier() or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
        raise CheckpointError(
            f"{index}: expected a name with [library, class], found {shown(name)} with {shown(entry)}"
        )
    library, class_name = entry
    folder = index.parent / name
    for kinds, find in ((_MODELS, _open_model), (_TOKENIZERS, _open_tokenizer), (_SCHEDULERS, _open_scheduler)):
        if class_name in kinds.get(library, ()):
            return find(name, library, class_name, folder)
    kinds = _TOKENIZERS if name.startswith("tokenizer") else _SCHEDULERS if name == "scheduler" else _MODELS
    allowed = {class_name for names in kinds.values() for class_name in names}
    raise CheckpointError(f"{index}: {name} is {shown(entry)}; expected {either(allowed)}")


def model_class_allowed(library: str, class_name: str) -> bool:
    return class_name in _MODELS.get(library, ())


def _open_model(name: str, library: str, class_name: str, folder: Path) -> Component:
    config = folder / "config.json"
    read_json(config)
    paths, variant = find_weights(folder, "diffusion_pytorch_model" if library in ("diffusers", "duet") else "model")
    digest = check_model(config, paths)
    return Component(name, library, class_name, config, tuple(paths), variant, digest)


def check_model(config: Path, weights: Iterable[Path]) -> str:
    """Check the headers of a model's weights, and its configuration against them; gives the digest of the weights.

    A configuration is refused if it could fetch code, or would build a network that the weights could never fill.
    """
    files = [check_weights(path) for path in weights]
    tensors = sum(file.tensors for file in files)
    largest = max((size for file in files for entry in file.entries.values() for size in entry.shape), default=0)
    for key, value in _walk(read_json(config)):
        # transformers takes a name with a slash for a repository, from which it fetches a compiled kernel.
        if key.endswith("attn_implementation") and value not in (None, "eager", "sdpa"):
            raise CheckpointError(f"{config}: expected the attention of torch, found {key} {shown(value)}")
        if key == "quantization_config" and value:
            raise CheckpointError(f"{config}: expected plain weights, found quantised ones")
        if ("layers" in key or "depth" in key) and isinstance(value, int) and value > tensors:
            raise CheckpointError(f"{config}: expected {key} to suit weights of {tensors} tensors, found {value}")
        if _WIDTH.search(key) and isinstance(value, int) and value > max(_WIDEST, largest):
            raise CheckpointError(f"{config}: expected {key} to suit weights up to {largest} wide, found {value}")
    return hashlib.sha256("".join(f"{file.size}:{file.digest};" for file in files).encode()).hexdigest()


def _walk(value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, and with each item of a list, at any depth."""
    waiting: list[tuple[str, Any]] = list(value.items())
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((key, item) for item in value)


def _open_tokenizer(name: str, library: str, class_name: str, folder: Path) -> Component:
    config = folder / "tokenizer_config.json"
    read_json(config)
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        expected = ", or ".join(" and ".join(names) for names in _TOKENIZER_FILES)
        raise CheckpointError(f"{folder}: expected {expected}; found {_listing(folder)}")
    return Component(name, library, class_name, config)


def _open_scheduler(name: str, library: str, class_name: str, folder: Path) -> Component:
    config = folder / "scheduler_config.json"
    steps = read_json(config).get("num_train_timesteps", 0)
    if not isinstance(steps, int) or steps > _MOST_TRAIN_STEPS:  # a scheduler makes tables of this length
        raise CheckpointError(
            f"{config}: expected num_train_timesteps up to {_MOST_TRAIN_STEPS:,}, found {shown(steps)}"
        )
    return Component(name, library, class_name, config)


def find_weights(folder: Path, stem: str) -> tuple[list[Path], str | None]:
    """The files of a component, whole or in shards, in the full or the fp16 variant; the full one first."""
    for variant in (None, "fp16"):
        infix = f".{variant}" if variant else ""
        if (whole := folder / f"{stem}{infix}.safetensors").exists():
            return [whole], variant
        if (index := folder / f"{stem}.safetensors.index{infix}.json").exists():
            return [folder / name for name in shard_names(index)], variant
    raise CheckpointError(f"expected weights at {folder / stem}.safetensors, found {_listing(folder)}")


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return f"{pickled[0]}, a Python pickle, which can run code and is never opened: convert it to safetensors"
    return ", ".join(names[:10]) or "an empty folder"


def either(names: Iterable[str]) -> str:
    return " or ".join(sorted(names))
