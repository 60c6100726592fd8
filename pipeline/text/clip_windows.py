"""Prompts of any length for CLIP: cut into windows of the tokenizer's length, encoded apart, and joined."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .prompt_weights import WeightedPrompt

CLIP_WINDOW = 77  # arXiv 2103.00020, section 2.4
QUOTED = 60  # characters of a prompt that a notice repeats


@dataclass(frozen=True)
class Windows:
    """ids: of each window, with its beginning and end; weights: of each token; notices: sentences for the user."""

    ids: list[list[int]]
    weights: list[list[float]]
    notices: tuple[str, ...]

    def filled(self, count: int, tokenizer: Any) -> "Windows":
        """With empty windows up to ``count``: what is steered to and from must have one length."""
        missing = count - len(self.ids)
        empty = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        return Windows(self.ids + missing * [empty], self.weights + missing * [[1.0, 1.0]], self.notices)


@dataclass(frozen=True)
class Encoded:
    """tokens: (1, L, D); pooled: (1, P) or None; counted: (windows, length) bool, False where a window is padded."""

    tokens: Tensor
    pooled: Tensor | None
    counted: Tensor


def cut_windows(tokenizer: Any, prompt: WeightedPrompt) -> Windows:
    """A prompt's tokens in windows. What is unknown, and that there is more than one window, is noticed."""
    encoded = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    notices = []
    unknown = [
        prompt.text[start:end]
        for token, (start, end) in zip(ids, offsets, strict=True)
        if token == tokenizer.unk_token_id
    ]
    if unknown and tokenizer.unk_token_id not in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        notices.append(f"not known to the tokenizer and so not heard: {' '.join(unknown)[:QUOTED]}")
    by_character = [phrase.weight for phrase in prompt.phrases for _ in phrase.text]
    weights = [by_character[start] if start < len(by_character) else 1.0 for start, _ in offsets]
    room = window_of(tokenizer) - 2
    starts = range(0, len(ids), room) or range(1)
    if len(starts) > 1:
        notices.append(f"the prompt fills {len(starts)} windows of {room} tokens; they are encoded apart and joined")
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    return Windows(
        [[first, *ids[start : start + room], last] for start in starts],
        [[1.0, *weights[start : start + room], 1.0] for start in starts],
        tuple(notices),
    )


def encode_windows(encoder: Any, tokenizer: Any, windows: Windows, *, pads: bool, layer: int = 0) -> Encoded:
    """The hidden states of ``layer``, 0 being the last one after its norm, of all windows in a row.

    pads: to the tokenizer's window, whose padding is then attended to as the model was trained; otherwise to the
    longest window, masked. A token of weight w becomes empty + w (token - empty), where empty is what the encoder says
    at the same place of an empty prompt, as ComfyUI's own text encoder does; only where it pads. pooled is the windows'
    mean, weighted by their tokens.
    """
    longest = window_of(tokenizer) if pads else max(map(len, windows.ids))
    ids = torch.tensor([_padded(window, longest, tokenizer.pad_token_id) for window in windows.ids])
    counted = torch.tensor([_padded([True] * len(window), longest, False) for window in windows.ids])
    weights = torch.tensor([_padded(row, longest, 1.0) for row in windows.weights])
    weighted = pads and bool((weights != 1).any())
    if weighted:
        empty = _padded([tokenizer.bos_token_id, tokenizer.eos_token_id], longest, tokenizer.pad_token_id)
        ids = torch.cat([ids, torch.tensor([empty])])
    mask = None if pads else counted.long().to(encoder.device)
    with torch.inference_mode():
        output = encoder(input_ids=ids.to(encoder.device), attention_mask=mask, output_hidden_states=layer != 0)
        hidden = output.hidden_states[layer] if layer else output.last_hidden_state
        if weighted:
            hidden, nothing = hidden[:-1], hidden[-1:]
            hidden = nothing + weights.to(hidden).unsqueeze(-1) * (hidden - nothing)
        pooled = getattr(output, "text_embeds", None)
        if pooled is not None:
            pooled = pooled[: len(counted)]
            share = counted.sum(dim=1, keepdim=True).to(pooled.device).float() - 2  # the two marks say nothing
            share = share.clamp(min=1 if len(counted) == 1 else 0)
            if not share.any():
                share = torch.ones_like(share)
            # Of many windows the sums of half precision would end in infinity.
            pooled = ((pooled.float() * share).sum(dim=0, keepdim=True) / share.sum()).to(pooled.dtype)
    return Encoded(hidden.flatten(0, 1)[None], pooled, counted)


def window_of(tokenizer: Any) -> int:
    """Tokens at once. A tokenizer whose configuration is gone says 10^30."""
    return min(tokenizer.model_max_length, CLIP_WINDOW)


def content(counted: Tensor) -> Tensor:
    """The counted tokens without beginning and end marks, so that an empty prompt counts no token at all."""
    kept = counted.clone()
    kept[:, 0] = False
    kept[torch.arange(len(counted)), counted.sum(dim=1) - 1] = False
    return kept


def _padded(row: list, length: int, filler: Any) -> list:
    return row + (length - len(row)) * [filler]
