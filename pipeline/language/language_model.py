"""A language model on disk -> a module that the cache can hold, and its tokenizer.

A folder as transformers saves it (config.json, model.safetensors, tokenizer.json), or one GGUF file. Offline, classes
from an allow-list, and no code of the folder's own: transformers' classes are named here, never by an ``auto_map``.
"""

import hashlib
import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from ..checkpoints import LOADING_ERRORS, CheckpointError, building
from ..files.components import check_model, either, find_weights
from ..files.content import Content, Digests
from ..files.gguf_files import check_gguf
from ..files.safetensors_files import read_json, shown
from ..files.weights import key_of, read_tensors
from ..model_cache import ModelCache, ModelKey
from ..residency import is_out_of_memory

# Decoders with plain attention, by the name that config.json gives in its architectures.
CLASSES = (
    "ApertusForCausalLM",
    "Cohere2ForCausalLM",
    "CohereForCausalLM",
    "Ernie4_5ForCausalLM",
    "Exaone4ForCausalLM",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "GlmForCausalLM",
    "GraniteForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "LlamaForCausalLM",
    "MinistralForCausalLM",
    "MistralForCausalLM",
    "Olmo2ForCausalLM",
    "OPTForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
)
# The same by what GGUF calls them.
GGUF_CLASSES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
_LARGEST_TOKENIZER = 64 * 2**20
_MOST_WEIGHTS_A_BYTE = 8  # the smallest quantisation takes 1.6 bits a weight
_CODE = ("config.json", "tokenizer_config.json")  # where an auto_map names Python files of the folder
_QUOTED = 300


@dataclass(frozen=True)
class LanguageModel:
    """Found whole when it was opened; holds no weights. path: a folder or a .gguf file; tokenizer_file: beside the
    weights, or the .gguf file itself; identity: its name and a digest of what decides what it writes.
    """

    path: Path
    class_name: str
    weights: tuple[Path, ...]
    tokenizer_file: Path
    identity: str
    digests: Digests = field(default_factory=Digests, repr=False, compare=False)
    _tokenizer: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def _is_gguf(self) -> bool:
        return self.path.suffix.lower() == ".gguf"

    def use(self, cache: ModelCache, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
        """On the cache's device, and pinned, while in the block. dtype: float32 on a CPU, else bfloat16."""
        on_cpu = cache.residency.device.type == "cpu"
        dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
        return cache.use(self.key(dtype), lambda: self.build(dtype))

    def key(self, dtype: torch.dtype) -> ModelKey:
        return key_of(self.weights, self.class_name, dtype, self.content())

    def content(self) -> Content:
        """What it is, as it lies on disk now, whatever it is called."""
        if self._is_gguf:  # its configuration is in the file
            return self.digests.of_network(self.weights, "", self.class_name, {})
        told = self.path / "generation_config.json"
        # Always there, so that it is never taken for a checkpoint's encoder, which has other ends.
        ends = read_json(told).get("eos_token_id") if told.is_file() else None
        config = read_json(self.path / "config.json") | {"generation_config": {"eos_token_id": ends}}
        return self.digests.of_network(self.weights, "transformers", self.class_name, config)

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Read the weights to the CPU, quantised ones unpacked. Raises CheckpointError if they are not the class's."""
        try:
            with torch.inference_mode(False):
                config = self._config()
                skeleton = self._skeleton(config)
                tensors = _gguf(self.path, skeleton)["tensors"] if self._is_gguf else read_tensors(self.weights)
                with building:
                    module, report = type(skeleton).from_pretrained(
                        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
                    )
        except (*LOADING_ERRORS, OverflowError, SafetensorError) as error:
            if is_out_of_memory(error) or isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path}: expected weights of a {self.class_name}, got: {str(error)[:_QUOTED]}"
            ) from error
        lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if lacking:
            raise CheckpointError(f"{self.path}: expected the weights of a {self.class_name}; {lacking[0]} is missing")
        # Of settings for generation only the end tokens are kept: the rest could ask for 10,000 beams.
        module.generation_config = GenerationConfig(eos_token_id=self._ends(module))
        return module.eval().requires_grad_(False)

    def tokenizer(self) -> Any:
        """Read once; it keeps no state between calls. Always of this one class, so that no folder chooses another."""
        if not self._tokenizer:
            folder = self.path
            options: dict[str, Any] = {}
            if self._is_gguf:
                check_gguf(self.path)
                _require_gguf(self.path)
                folder, options = self.path.parent, {"gguf_file": self.path.name}
            try:
                found = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **options)
            except Exception as error:  # tokenizers raises plain Exception
                raise CheckpointError(
                    f"expected a tokenizer in {self.tokenizer_file}, got: {str(error)[:_QUOTED]}"
                ) from error
            self._tokenizer.append(found)
        return self._tokenizer[0]

    def _config(self) -> PretrainedConfig:
        kind = getattr(transformers, self.class_name).config_class
        if self._is_gguf:
            check_gguf(self.path)  # again: it may have been replaced since it was opened
            _require_gguf(self.path)
            told = _gguf(self.path)["config"]
            if told.get("model_type") != kind.model_type:
                raise CheckpointError(
                    f"{self.path}: expected a {kind.model_type}, found {shown(told.get('model_type'))}"
                )
        else:
            check_model(self.path / "config.json", self.weights)
            told = read_json(self.path / "config.json")
        try:
            return kind.from_dict(told)
        except Exception as error:  # transformers checks types by a library with errors of its own
            raise CheckpointError(
                f"{self.path}: expected the configuration of a {self.class_name}, got: {str(error)[:_QUOTED]}"
            ) from error

    def _skeleton(self, config: PretrainedConfig) -> Any:
        """Shapes alone: a configuration of a few bytes may ask for terabytes."""
        with torch.device("meta"):
            skeleton = getattr(transformers, self.class_name)(config)
        needed = sum(parameter.numel() for parameter in skeleton.parameters())
        there = sum(path.stat().st_size for path in self.weights) * _MOST_WEIGHTS_A_BYTE
        if needed > there:
            raise CheckpointError(f"{self.path}: expected {needed:,} weights, found room for {there:,} at most")
        return skeleton

    def _ends(self, module: Any) -> Any:
        told = self.path / "generation_config.json"
        ends = read_json(told).get("eos_token_id") if told.is_file() else None
        return module.config.eos_token_id if ends is None else ends


def open_language_model(path: Path, digests: Digests | None = None) -> LanguageModel:
    """Check a folder, or a .gguf file, by its JSON and headers. Raises CheckpointError, naming the file.

    digests: what remembers the contents of weights, so that they are not read again to be told apart.
    """
    return replace(_open(path), digests=digests or Digests())


def _open(path: Path) -> LanguageModel:
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"expected a folder with a config.json, or a .gguf file, at {path}; found neither")
    config = path / "config.json"
    named = read_json(config).get("architectures")
    _refuse_code(path)
    class_name = named[0] if isinstance(named, list) and len(named) == 1 else None
    if class_name not in CLASSES:
        raise CheckpointError(f"{config}: expected as architectures one of {either(CLASSES)}; found {shown(named)}")
    weights, _ = find_weights(path, "model")
    digest = check_model(config, weights)
    words = path / "tokenizer.json"
    if not words.is_file() or words.stat().st_size > _LARGEST_TOKENIZER:
        found = f"one of {words.stat().st_size:,} bytes" if words.is_file() else "none"
        raise CheckpointError(
            f"expected a tokenizer at {words}, of at most {_LARGEST_TOKENIZER:,} bytes; found {found}"
        )
    # All of the JSON counts: with another tokenizer or template, the same weights write something else.
    others = sorted((*path.glob("*.json"), *path.glob("*.jinja")))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in others]
    return LanguageModel(path, class_name, tuple(weights), words, _identity(path, digest, stamps))


def _open_gguf(path: Path) -> LanguageModel:
    found = check_gguf(path)
    if found.architecture not in GGUF_CLASSES:
        named = shown(found.architecture)
        raise CheckpointError(f"{path}: expected the architecture {either(GGUF_CLASSES)}, found {named}")
    return LanguageModel(path, GGUF_CLASSES[found.architecture], (path,), path, _identity(path, found.digest))


def _identity(path: Path, *what: object) -> str:
    return f"{path.name}@{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}"


def _refuse_code(folder: Path) -> None:
    for name in _CODE:
        if (folder / name).is_file() and "auto_map" in read_json(folder / name, largest=_LARGEST_TOKENIZER):
            raise CheckpointError(f"{folder / name}: expected a class of transformers, found an auto_map to code")
    for name, what in (("custom_generate", "code"), ("adapter_config.json", "an adapter for another model")):
        if (folder / name).exists():
            raise CheckpointError(f"{folder}: expected a whole model without code, found {what} in {name}")


def _gguf(path: Path, skeleton: nn.Module | None = None) -> dict[str, Any]:
    """transformers' own reader of a header and, where a module is to be filled, of the weights by its names.

    Called itself, because ``from_pretrained(gguf_file=...)`` asks for the package accelerate before it does just this.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    return load_gguf_checkpoint(str(path), return_tensors=skeleton is not None, model_to_load=skeleton)


def _require_gguf(path: Path) -> None:
    try:
        importlib.import_module("gguf")
    except ImportError:
        raise CheckpointError(
            f"{path}: a GGUF file needs the package gguf in the host's environment: pip install gguf"
        ) from None
