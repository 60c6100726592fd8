"""Words -> embeddings by a diffusers pipeline's own ``encode_prompt``, for the families that are not CLIP alone."""

import importlib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import Checkpoint
from ..denoising.diffusers_pipelines import assemble
from ..files.safetensors_files import read_json
from ..model_cache import ModelCache

QUOTED = 60  # characters of a prompt that a notice repeats


@dataclass(frozen=True)
class Heard:
    """tokens: (1, L, D); pooled: (1, P) or None; mask: (1, L) bool; second: of another encoder, or None."""

    tokens: Tensor
    pooled: Tensor | None
    mask: Tensor
    second: "Heard | None" = None


@contextmanager
def encoders_of(cache: ModelCache, checkpoint: Checkpoint) -> Iterator[Any]:
    """The family's pipeline with its text encoders, pinned while in the block, and its tokenizers; nothing else."""
    tasks = checkpoint.family.tasks
    assert tasks is not None, "a family that the pack encodes itself"
    with ExitStack() as stack:
        parts: dict[str, Any] = {}
        for name in checkpoint.components:
            if name.startswith("text_encoder"):
                parts[name] = stack.enter_context(checkpoint.use(cache, name))
            elif name.startswith("tokenizer"):
                parts[name] = checkpoint.tokenizer(name)
        if "tokenizer_3" in checkpoint.family.windows and "text_encoder_3" not in parts:
            parts["transformer"] = _without_weights(checkpoint, "transformer")
        yield assemble(checkpoint, tasks.text_to_image, parts)


def split_prompt(pipeline: Any, checkpoint: Checkpoint, text: str) -> tuple[list[str], tuple[str, ...]]:
    """The prompt in pieces that the main encoder hears whole, and what is told of words that it does not hear.

    Where the denoiser listens to any number of tokens, the pieces are to be encoded apart and joined. Elsewhere, and
    for the other encoders, what is beyond the window is dropped, and the notice quotes it.
    """
    family = checkpoint.family
    pieces, notices, main = [text], [], True
    for name, window in family.windows.items():
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is None:
            continue
        if main and (unknown := _unknown(tokenizer, text)):
            notices.append(f"not known to the tokenizer and so not heard: {unknown[:QUOTED]}")
        cut = _cut(tokenizer, text, window - _marks(pipeline, tokenizer, family.chat_template))
        if main and len(cut) > 1 and family.joins_windows:
            pieces = cut
            notices.append(f"the prompt fills {len(cut)} windows of {window} tokens; they are encoded apart and joined")
        elif len(cut) > 1:
            component = name.replace("tokenizer", "text_encoder")
            notices.append(
                f"beyond the {window} tokens of {component} and so not heard by it: {cut[1].strip()[:QUOTED]!r}"
            )
        main = False
    return pieces, tuple(notices)


def hear(pipeline: Any, checkpoint: Checkpoint, pieces: list[str], *, negative: bool = False) -> Heard:
    """The pieces encoded one by one and joined. pooled is their mean, weighted by their length in characters."""
    with torch.inference_mode():
        heard = [_hear(pipeline, checkpoint, piece, negative) for piece in pieces]
    shares = torch.tensor([float(len(piece)) for piece in pieces])
    shares = shares / shares.sum() if shares.any() else torch.full_like(shares, 1 / len(shares))
    pooled = [piece.pooled for piece in heard if piece.pooled is not None]
    return Heard(
        torch.cat([piece.tokens for piece in heard], dim=1),
        sum(share * one for share, one in zip(shares.tolist(), pooled, strict=True)) if pooled else None,  # type: ignore[arg-type]
        torch.cat([piece.mask for piece in heard], dim=1),
        heard[0].second,
    )


def _hear(pipeline: Any, checkpoint: Checkpoint, text: str, negative: bool) -> Heard:
    encode, family = pipeline.encode_prompt, checkpoint.family
    accepted = inspect.signature(encode).parameters
    # A list that the pipeline may change; its device is where the first encoder lies now.
    arguments: dict[str, Any] = {"device": pipeline.text_encoder.device}
    options: dict[str, Any] = {
        "do_classifier_free_guidance": False,  # what is steered away from is encoded by a call of its own
        "max_sequence_length": next(iter(family.windows.values())),
        "prompt_2": None,
        "prompt_3": None,
    }
    if "text_encoder_index" in accepted:
        del options["max_sequence_length"]  # it knows the window of each of its two encoders
    if "complex_human_instruction" in accepted and not negative:
        options["complex_human_instruction"] = (
            inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        )
    arguments |= {name: value for name, value in options.items() if name in accepted}
    found = _named(family.encoded, encode([text], **arguments))
    second = None
    if "text_encoder_index" in accepted:
        second = _named(family.encoded, encode([text], **arguments, text_encoder_index=1))
    return Heard(found.tokens, found.pooled, found.mask, second)


def _named(names: tuple[str | None, ...], values: tuple[Any, ...]) -> Heard:
    named = {name: value for name, value in zip(names, values, strict=False) if name}
    tokens = named["tokens"]
    if isinstance(tokens, list):  # one tensor (L, D) for each prompt
        tokens = tokens[0].unsqueeze(0)
    mask = named.get("mask")
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
    return Heard(tokens, named.get("pooled"), mask)


def _without_weights(checkpoint: Checkpoint, name: str) -> Any:
    """The real class on the meta device: the pipeline asks its configuration how wide the words are to be."""
    part = checkpoint.components[name]
    module = getattr(importlib.import_module("diffusers"), part.class_name)
    with torch.device("meta"):
        return module.from_config(read_json(part.config))


def _marks(pipeline: Any, tokenizer: Any, chat_template: str) -> int:
    """How many tokens of the window are no words of the prompt."""
    if chat_template:
        nothing = [{"role": "user", "content": ""}]
        text = tokenizer.apply_chat_template(
            nothing, tokenize=False, add_generation_prompt=True, enable_thinking=chat_template == "thinking"
        )
        return len(tokenizer(text)["input_ids"])
    if hasattr(pipeline, "prompt_template_encode"):
        template = len(tokenizer(pipeline.prompt_template_encode.format(""))["input_ids"])
        return max(0, template - pipeline.prompt_template_encode_start_idx)
    return len(tokenizer("")["input_ids"])


def _unknown(tokenizer: Any, text: str) -> str:
    """The words that become the mark of the unknown, as all Chinese does in T5."""
    mark = tokenizer.unk_token_id
    if not getattr(tokenizer, "is_fast", False) or mark in (None, tokenizer.pad_token_id, tokenizer.eos_token_id):
        return ""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return " ".join(text[start:end].strip() for token, (start, end) in found if token == mark)


def _cut(tokenizer: Any, text: str, room: int) -> list[str]:
    """The text in pieces of at most ``room`` tokens, at least one."""
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [tokenizer.decode(ids[start : start + room]) for start in range(0, len(ids), room)] or [text]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    starts = [offsets[index][0] for index in range(0, len(offsets), room)]
    if len(starts) < 2:
        return [text]
    return [text[start:end] for start, end in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True)]
