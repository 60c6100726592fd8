"""Text encoders that lie on disk by themselves: CLIP, T5, BERT, and language models, of which a layer is heard."""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from ..checkpoints import LOADING_ERRORS, building, own
from ..conditioning import PromptEmbeds, Space, all_numbers
from ..files.components import Component, check_model, either, find_weights
from ..files.content import Content, Digests, small_files
from ..files.safetensors_files import CheckpointError, read_json, shown
from ..files.single_file_weights import build
from ..files.weights import key_of, read_tensors
from ..language.language_model import CLASSES, LanguageModel, open_language_model
from ..model_cache import ModelCache
from ..residency import is_out_of_memory
from .characters import whole_characters
from .clip_windows import QUOTED, content, cut_windows, encode_windows
from .encoder_files import open_encoder_file
from .prompt_weights import read_weights

LONGEST_PROMPT = 20_000  # characters
LARGEST_WINDOW = 2048  # tokens that are encoded at once, whatever a language model could take
# By the name that config.json gives in its architectures: the class of its encoder, and of its tokenizer.
_KINDS = {
    "BertModel": ("BertModel", "BertTokenizerFast"),
    "CLIPModel": ("CLIPTextModelWithProjection", "CLIPTokenizerFast"),
    "CLIPTextModel": ("CLIPTextModel", "CLIPTokenizerFast"),
    "CLIPTextModelWithProjection": ("CLIPTextModelWithProjection", "CLIPTokenizerFast"),
    "MT5EncoderModel": ("MT5EncoderModel", "T5TokenizerFast"),
    "T5EncoderModel": ("T5EncoderModel", "T5TokenizerFast"),
    "T5ForConditionalGeneration": ("T5EncoderModel", "T5TokenizerFast"),
    "UMT5EncoderModel": ("UMT5EncoderModel", "T5TokenizerFast"),
}
_WORDS = ("spiece.model", "tokenizer.json", "vocab.json", "vocab.txt")
_T5_WINDOW = 512
_MOST_WEIGHTS_A_BYTE = 1  # a file of float8 holds one weight in a byte
_QUOTED = 300


@dataclass(frozen=True)
class TextEncoder:
    """An encoder whose files were found whole. Holds no weights.

    path: a folder or a single file; class_name: in transformers; config: of that class; digest: of its headers; words:
    the folder of the tokenizer, with ``options``. language_model: set for a decoder's folder, which shares its weights
    in the cache with whatever else writes or reads by it; part: set for a single file.
    """

    path: Path
    class_name: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    digest: str
    words: Path
    tokenizer_class: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    language_model: LanguageModel | None = None
    part: Component | None = None
    digests: Digests = field(default_factory=Digests, repr=False, compare=False)
    _tokenizer: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def identity(self) -> str:
        """For ``Space.model``: which weights made the embeddings."""
        return f"{self.path.name}@{self.digest[:8]}"

    def use(self, cache: ModelCache) -> AbstractContextManager[Any]:
        """On the cache's device, and pinned, while in the block; float32 on a CPU, else bfloat16."""
        if self.language_model is not None:
            return self.language_model.use(cache)
        dtype = torch.float32 if cache.residency.device.type == "cpu" else torch.bfloat16
        return cache.use(key_of(self.weights, self.class_name, dtype, self.content()), lambda: self.build(dtype))

    def content(self) -> Content:
        """What it is, as it lies on disk now, whatever it is called."""
        if self.language_model is not None:
            return self.language_model.content()
        if self.part is not None:
            return self.digests.of(self.part)
        return self.digests.of_network(self.weights, "transformers", self.class_name, self.config)

    def told(self) -> object:
        """All that decides what it makes of words, as the store of embeddings takes it."""
        words = self.digests.of_files(small_files(self.words))
        return [self.identity, self.class_name, self.content().digest, self.tokenizer_class, words, self.options]

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Read the weights to the CPU. Raises CheckpointError if they are not those of the class."""
        kind = getattr(transformers, self.class_name)
        try:
            with torch.inference_mode(False):
                if self.part is not None:
                    with building:
                        module = build(self.part, dtype)
                        own(module)
                    return module.eval().requires_grad_(False)
                config = kind.config_class.from_dict(dict(self.config))
                self._check_size(kind, config)
                with building:
                    module, report = kind.from_pretrained(
                        None,
                        config=config,
                        state_dict=read_tensors(self.weights),
                        dtype=dtype,
                        output_loading_info=True,
                    )
        except (*LOADING_ERRORS, SafetensorError) as error:
            if is_out_of_memory(error) or isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path}: expected weights of a {self.class_name}, got: {str(error)[:_QUOTED]}"
            ) from error
        lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if lacking:
            raise CheckpointError(f"{self.path}: expected the weights of a {self.class_name}; {lacking[0]} is missing")
        return module.eval().requires_grad_(False)

    def tokenizer(self) -> Any:
        """Read once; it keeps no state between calls."""
        if self.language_model is not None:
            return self.language_model.tokenizer()
        if not self._tokenizer:
            kind = getattr(transformers, self.tokenizer_class)
            try:
                self._tokenizer.append(kind.from_pretrained(str(self.words), local_files_only=True, **self.options))
            except Exception as error:  # tokenizers raises plain Exception
                raise CheckpointError(
                    f"{self.words}: expected the files of a {self.tokenizer_class}, got: {str(error)[:_QUOTED]}"
                ) from error
        return self._tokenizer[0]

    def _check_size(self, kind: Any, config: Any) -> None:
        """A configuration of a few bytes may ask for terabytes: shapes are made first, and no memory."""
        with torch.device("meta"):
            needed = sum(parameter.numel() for parameter in kind(config).parameters())
        there = sum(path.stat().st_size for path in self.weights) * _MOST_WEIGHTS_A_BYTE
        if needed > there:
            raise CheckpointError(f"{self.path}: expected {needed:,} weights, found room for {there:,} at most")


def open_text_encoder(path: Path, digests: Digests | None = None) -> TextEncoder:
    """Check a folder as transformers saves it, or a single .safetensors file, by its JSON and headers.

    digests: what remembers the contents of weights, so that they are not read again to be told apart. Raises
    CheckpointError, naming the file.
    """
    digests = digests or Digests()
    return replace(_open(path, digests), digests=digests)


def _open(path: Path, digests: Digests) -> TextEncoder:
    if path.suffix == ".safetensors" and not path.is_dir():
        part, words = open_encoder_file(path)
        config = read_json(part.config) | dict(part.options)
        return TextEncoder(
            path, part.class_name, config, part.weights, part.digest, words.folder, words.class_name, words.options,
            part=part,
        )  # fmt: skip
    if not path.is_dir():
        raise CheckpointError(
            f"expected a text encoder's folder with a config.json, or a .safetensors file, at {path}; found neither"
        )
    config_path = path / "config.json"
    config = read_json(config_path)
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else None
    if architecture in CLASSES:
        model = open_language_model(path, digests)
        digest = hashlib.sha256(model.identity.encode()).hexdigest()
        return TextEncoder(path, model.class_name, config, model.weights, digest, path, language_model=model)
    if architecture not in _KINDS:
        raise CheckpointError(
            f"{config_path}: expected as architectures one of {either([*_KINDS, *CLASSES])}; found {shown(named)}"
        )
    if "auto_map" in config:
        raise CheckpointError(f"{config_path}: expected a class of transformers, found an auto_map to code")
    class_name, tokenizer = _KINDS[architecture]
    if architecture == "CLIPModel" and isinstance(config.get("text_config"), dict):
        config = config["text_config"] | {"projection_dim": config.get("projection_dim", 512)}
    if not any((path / name).is_file() for name in _WORDS):  # transformers would make an empty one of nothing
        raise CheckpointError(f"{path}: expected the words of a {tokenizer} in {either(_WORDS)}, found none")
    weights, _ = find_weights(path, "model")
    digest = check_model(config_path, weights)
    return TextEncoder(path, class_name, config, tuple(weights), digest, path, tokenizer)


def encode_text(
    cache: ModelCache, encoder: TextEncoder, prompt: str, *, layer: int = -1, chat_template: bool = False
) -> PromptEmbeds:
    """One prompt by any encoder. tokens: (1, L, D), the hidden states of ``layer``; pooled: CLIP's projection, or None.

    layer: 0 what enters the first block, 1 and on what each block gives, -1 the last one after its norm. chat_template:
    the prompt is said as a user says it to a language model. A prompt beyond the encoder's window is cut into windows
    which are encoded apart and joined. Weighted phrases act in CLIP; elsewhere a notice says that they do not.
    Raises ValueError for a layer or a template that the encoder has not, or text beyond 20,000 characters,
    FloatingPointError where the encoder gives no numbers.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"expected a prompt of at most {LONGEST_PROMPT:,} characters, got {len(prompt):,}")
    prompt, halves = whole_characters(prompt)
    weighted, tokenizer = read_weights(prompt), encoder.tokenizer()
    is_clip = encoder.class_name.startswith("CLIP")
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"expected a language model with a chat template, got {encoder.path.name} without one")
    with encoder.use(cache) as module:
        config = getattr(module.config, "text_config", module.config)  # of a model that sees pictures too
        layers = int(getattr(config, "num_hidden_layers", None) or config.num_layers)
        if not -layers - 1 <= layer <= layers:
            raise ValueError(f"layer must be {-layers - 1} to {layers} for {encoder.path.name}, got {layer}")
        if is_clip:
            windows = cut_windows(tokenizer, weighted)
            from_last = layer if layer < 0 else layer - layers - 1
            found = encode_windows(module, tokenizer, windows, pads=True, layer=0 if from_last == -1 else from_last)
            mask = content(found.counted).flatten()[None]
            notices = halves + weighted.notices + windows.notices
            return _embeds(encoder, layer, found.tokens, mask, notices, found.pooled)
        plain, notices = (weighted.text, _UNWEIGHTED) if weighted.explicit else (prompt, ())
        tokens, mask, told = _windows(module, encoder, plain, layer, chat_template)
        return _embeds(encoder, layer, tokens, mask, halves + notices + told)


_UNWEIGHTED = ("this encoder takes no weighted phrases; their words are read without their weights",)


def _embeds(
    encoder: TextEncoder,
    layer: int,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    notices: tuple[str, ...],
    pooled: torch.Tensor | None = None,
) -> PromptEmbeds:
    space = Space(encoder.identity, f"hidden_states[{layer}]", tokens.shape[-1])
    found = PromptEmbeds(tokens, pooled, mask, space, notices=notices)
    if not all_numbers(found):
        raise FloatingPointError(f"{encoder.path.name}: the text encoder gave values that are no numbers")
    return found


def _windows(
    module: Any, encoder: TextEncoder, prompt: str, layer: int, chat_template: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    tokenizer = encoder.tokenizer()
    if chat_template:
        said = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(prompt, add_special_tokens=not chat_template, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    known = {tokenizer.pad_token_id, tokenizer.eos_token_id, None}
    unknown = [
        prompt[start:end]
        for token, (start, end) in zip(ids, offsets, strict=True)
        if token == tokenizer.unk_token_id and token not in known
    ]
    notices = (f"not known to the tokenizer and so not heard: {' '.join(unknown)[:QUOTED]}",) if unknown else ()
    config = getattr(module.config, "text_config", module.config)
    reach = getattr(config, "max_position_embeddings", None) or _T5_WINDOW
    room = min(int(reach), LARGEST_WINDOW)
    starts = range(0, len(ids), room) or range(1)
    if len(starts) > 1:
        notices += (f"the prompt fills {len(starts)} windows of {room} tokens; they are encoded apart and joined",)
    ids = ids or [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0]
    body = module.base_model  # of a language model, without the logits of every token
    with torch.inference_mode():
        states = [
            body(
                input_ids=torch.tensor([ids[start : start + room]], device=module.device), output_hidden_states=True
            ).hidden_states[layer]
            for start in starts
        ]
    tokens = torch.cat(states, dim=1)
    special = {token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None}
    return tokens, torch.tensor([[token not in special for token in ids]]), notices
