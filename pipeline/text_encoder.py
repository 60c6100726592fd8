"""Words -> PromptEmbeds: tokenised, embedded and sequence-encoded, however long they are."""

import torch

from .checkpoints import Checkpoint
from .conditioning import PromptEmbeds, Space, all_numbers
from .denoising.diffusers_pipelines import pipeline_options
from .model_cache import ModelCache
from .text.characters import whole_characters
from .text.clip_windows import Encoded, Windows, content, cut_windows, encode_windows
from .text.prompt_pipelines import Heard, encoders_of, hear, split_prompt
from .text.prompt_weights import Phrase, WeightedPrompt, read_weights

LONGEST_PROMPT = 20_000  # characters; beyond it a prompt is a file dropped by mistake


def encode_prompt(
    cache: ModelCache, checkpoint: Checkpoint, prompt: str, negative_prompt: str | None = None
) -> PromptEmbeds:
    """One prompt in any language the checkpoint reads.

    tokens: (1, L, D), the encoders' hidden states; pooled: (1, P) where one has a projection. A prompt longer than the
    encoder's window is cut into windows which are encoded apart and joined, L being their sum; pooled is then their
    mean. Where the denoiser takes one window only, the rest is dropped and a notice quotes it. Weighted phrases, as
    ``read_weights`` has them, act in CLIP; another encoder reads the words without their weights and a notice says so.
    Families that steer by a negative prompt get one even if it is empty. Raises ValueError for text beyond 20,000
    characters or 32 nested brackets.
    """
    for name, text in (("prompt", prompt), ("negative prompt", negative_prompt or "")):
        if len(text) > LONGEST_PROMPT:
            raise ValueError(f"expected a {name} of at most {LONGEST_PROMPT:,} characters, got {len(text):,}")
    (prompt, halves), (negative_prompt, others) = whole_characters(prompt), whole_characters(negative_prompt or "")
    family = checkpoint.family
    asked = bool(negative_prompt.strip())
    wants_negative = family.takes_negative and (asked or family.default_guidance > 1)
    told = (f"{family.name} hears no negative prompt",) if asked and not family.takes_negative else ()
    wanted, told_too = _weighted(checkpoint, prompt)
    unwanted, told_last = _weighted(checkpoint, negative_prompt) if wants_negative else (None, ())
    notices = told + told_too + told_last + tuple(dict.fromkeys(halves + others))
    if family.encoded:
        found = _by_pipeline(cache, checkpoint, wanted.text, unwanted.text if unwanted else None, notices)
    else:
        found = _by_windows(cache, checkpoint, wanted, unwanted, notices)
    if not all_numbers(found):
        raise FloatingPointError(f"{checkpoint.folder.name}: the text encoder gave values that are no numbers")
    return found


def _weighted(checkpoint: Checkpoint, prompt: str) -> tuple[WeightedPrompt, tuple[str, ...]]:
    weighted = read_weights(prompt)
    if checkpoint.family.pads_to_window:
        return weighted, weighted.notices
    if not weighted.explicit:  # brackets are punctuation to an encoder that reads whole sentences
        return WeightedPrompt((Phrase(prompt, 1.0),), False, ()), ()
    told = f"{checkpoint.family.name} takes no weighted phrases; their words are read without their weights"
    return WeightedPrompt((Phrase(weighted.text, 1.0),), False, ()), (told,)


def _by_windows(
    cache: ModelCache,
    checkpoint: Checkpoint,
    wanted: WeightedPrompt,
    unwanted: WeightedPrompt | None,
    notices: tuple[str, ...],
) -> PromptEmbeds:
    numbers = [end for end in ("", "_2") if checkpoint.has(f"text_encoder{end}")]
    sides = [wanted] if unwanted is None else [wanted, unwanted]
    encoded: list[list[Encoded]] = [[] for _ in sides]
    for end in numbers:
        tokenizer = checkpoint.tokenizer(f"tokenizer{end}")
        windows = [cut_windows(tokenizer, side) for side in sides]
        if not end:
            notices += tuple(notice for side in windows for notice in side.notices)
        with checkpoint.use(cache, f"text_encoder{end}") as encoder:
            for into, side in zip(encoded, _of_one_length(checkpoint, windows, tokenizer), strict=True):
                pads, layer = checkpoint.family.pads_to_window, checkpoint.family.clip_layer
                into.append(encode_windows(encoder, tokenizer, side, pads=pads, layer=layer))
    negative = _embeds(checkpoint, encoded[1], None, ()) if unwanted is not None else None
    if negative is not None and unwanted is not None and not unwanted.text.strip() and _zeros_for_empty(checkpoint):
        pooled = torch.zeros_like(negative.pooled) if negative.pooled is not None else None
        negative = PromptEmbeds(torch.zeros_like(negative.tokens), pooled, negative.mask, negative.space)
    return _embeds(checkpoint, encoded[0], negative, notices)


def _of_one_length(checkpoint: Checkpoint, windows: list[Windows], tokenizer: object) -> list[Windows]:
    if not checkpoint.family.pads_to_window:
        return windows
    most = max(len(side.ids) for side in windows)
    return [side.filled(most, tokenizer) for side in windows]


def _zeros_for_empty(checkpoint: Checkpoint) -> bool:
    """SDXL was trained with zeros where nothing is asked for; its model_index.json may say otherwise."""
    return checkpoint.has("text_encoder_2") and pipeline_options(checkpoint).get("force_zeros_for_empty_prompt", True)


def _embeds(
    checkpoint: Checkpoint, encoded: list[Encoded], negative: PromptEmbeds | None, notices: tuple[str, ...]
) -> PromptEmbeds:
    tokens = torch.cat([one.tokens for one in encoded], dim=-1)
    counted = encoded[0].counted
    everything = checkpoint.family.pads_to_window
    layer = f"hidden_states[{checkpoint.family.clip_layer}]" if checkpoint.family.clip_layer else "last_hidden_state"
    return PromptEmbeds(
        tokens=tokens,
        pooled=encoded[-1].pooled,
        mask=(torch.ones_like(counted) if everything else content(counted)).flatten()[None],
        space=Space(checkpoint.identity_of("text_encoder"), layer, tokens.shape[-1]),
        negative=negative,
        notices=notices,
    )


def _by_pipeline(
    cache: ModelCache, checkpoint: Checkpoint, wanted: str, unwanted: str | None, notices: tuple[str, ...]
) -> PromptEmbeds:
    with encoders_of(cache, checkpoint) as pipeline:
        pieces, told = split_prompt(pipeline, checkpoint, wanted)
        others, told_too = split_prompt(pipeline, checkpoint, unwanted) if unwanted is not None else ([], ())
        most = max(len(pieces), len(others))
        negative = None
        if unwanted is not None:
            negative = _heard(checkpoint, hear(pipeline, checkpoint, _filled(others, most), negative=True), None, ())
        return _heard(
            checkpoint, hear(pipeline, checkpoint, _filled(pieces, most)), negative, notices + told + told_too
        )


def _filled(pieces: list[str], count: int) -> list[str]:
    return pieces + (count - len(pieces)) * [""]


def _heard(
    checkpoint: Checkpoint, heard: Heard, negative: PromptEmbeds | None, notices: tuple[str, ...]
) -> PromptEmbeds:
    second = _heard(checkpoint, heard.second, None, ()) if heard.second is not None else None
    space = Space(checkpoint.identity_of("text_encoder"), "prompt_embeds", heard.tokens.shape[-1])
    return PromptEmbeds(heard.tokens, heard.pooled, heard.mask, space, negative, notices, second)
