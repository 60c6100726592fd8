"""Words -> PromptEmbeds: tokenised, embedded and sequence-encoded, however long they are."""

from typing import Any

import torch
from torch import Tensor

from .checkpoints import Checkpoint
from .conditioning import PromptEmbeds, Space
from .model_cache import ModelCache

LONGEST_PROMPT = 20_000  # characters; beyond it a prompt is a file dropped by mistake
QUOTED = 60  # characters of a prompt that a notice repeats


def encode_prompt(
    cache: ModelCache, checkpoint: Checkpoint, prompt: str, negative_prompt: str | None = None
) -> PromptEmbeds:
    """One prompt in any language the checkpoint reads.

    tokens: (1, L, D), the encoder's hidden states; pooled: (1, P) where the encoder has a projection. A prompt longer
    than the encoder's window is cut into windows which are encoded apart and joined, L being their sum; pooled is then
    their mean, weighted by tokens. Families that steer by a negative prompt get one even if it is empty.
    Raises ValueError for text beyond 20,000 characters.
    """
    for name, text in (("prompt", prompt), ("negative prompt", negative_prompt or "")):
        if len(text) > LONGEST_PROMPT:
            raise ValueError(f"expected a {name} of at most {LONGEST_PROMPT:,} characters, got {len(text):,}")
    wants_negative = bool(negative_prompt and negative_prompt.strip()) or checkpoint.family.default_guidance > 1
    tokenizer = checkpoint.tokenizer()
    with checkpoint.use(cache, "text_encoder") as encoder:
        negative = _encode(encoder, tokenizer, checkpoint, negative_prompt or "") if wants_negative else None
        return _encode(encoder, tokenizer, checkpoint, prompt, negative)


def _encode(
    encoder: Any, tokenizer: Any, checkpoint: Checkpoint, text: str, negative: PromptEmbeds | None = None
) -> PromptEmbeds:
    windows, notices = _windows(tokenizer, text)
    longest = tokenizer.model_max_length if checkpoint.family.pads_to_window else max(map(len, windows))
    filler = tokenizer.pad_token_id
    ids = torch.tensor([window + [filler] * (longest - len(window)) for window in windows], device=encoder.device)
    counted = torch.tensor([[True] * len(window) + [False] * (longest - len(window)) for window in windows])
    # Models that were trained on padded windows attend to the padding; the others must not.
    mask = None if checkpoint.family.pads_to_window else counted.long().to(encoder.device)
    with torch.inference_mode():
        output = encoder(input_ids=ids, attention_mask=mask)
    pooled = getattr(output, "text_embeds", None)
    if pooled is not None:
        weight = counted.sum(dim=1, keepdim=True).to(pooled) - 2  # the marks of beginning and end say nothing
        weight = weight.clamp(min=1 if len(windows) == 1 else 0)
        pooled = (pooled * weight).sum(dim=0, keepdim=True) / weight.sum()
    tokens = output.last_hidden_state.flatten(0, 1)[None]
    everything = checkpoint.family.pads_to_window
    return PromptEmbeds(
        tokens=tokens,
        pooled=pooled,
        mask=torch.ones_like(counted.flatten()[None]) if everything else _content(counted, windows).flatten()[None],
        space=Space(checkpoint.identity_of("text_encoder"), "last_hidden_state", tokens.shape[-1]),
        negative=negative,
        notices=notices,
    )


def _content(counted: Tensor, windows: list[list[int]]) -> Tensor:
    """The counted tokens without beginning and end marks, so that an empty prompt counts no token at all."""
    content = counted.clone()
    content[:, 0] = False
    for row, window in enumerate(windows):
        content[row, len(window) - 1] = False
    return content


def _windows(tokenizer: Any, text: str) -> tuple[list[list[int]], tuple[str, ...]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    notices = []
    unknown = [
        text[start:end] for token, (start, end) in zip(ids, offsets, strict=True) if token == tokenizer.unk_token_id
    ]
    if unknown and tokenizer.unk_token_id not in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        notices.append(f"not known to the tokenizer and so not heard: {' '.join(unknown)[:QUOTED]}")
    room = tokenizer.model_max_length - 2
    chunks = [ids[start : start + room] for start in range(0, len(ids), room)] or [[]]
    if len(chunks) > 1:
        notices.append(f"the prompt fills {len(chunks)} windows of {room} tokens; they are encoded apart and joined")
    return [[tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id] for chunk in chunks], tuple(notices)
