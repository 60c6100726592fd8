"""Where words and picture meet: fused = F(cat(embed(text), features(picture))), with one dial between the two."""

from collections.abc import Callable

import torch
from torch import Tensor

from .checkpoints import Checkpoint
from .conditioning import FusedConditioning, ImageFeatures, PromptEmbeds, Space
from .fusing.fusion_network import FusionNetwork
from .fusing.token_fusion import METHODS as TOKEN_METHODS
from .fusing.token_fusion import TokenAdapter, join_tokens
from .model_cache import ModelCache

Meet = Callable[[FusionNetwork, Tensor, Tensor, float], Tensor]

PICTURE_LAYER = "pooler_output"  # of the image encoder, what a fusion network was trained on


def fuse(
    cache: ModelCache,
    checkpoint: Checkpoint,
    prompt: PromptEmbeds | None,
    image: ImageFeatures | None,
    *,
    method: str = "concat",
    strength: float = 0.5,
    adapter: TokenAdapter | None = None,
) -> FusedConditioning:
    """Words, a picture, or both, as one condition.

    strength: 0 is exactly the words alone, 1 exactly the picture alone; no effect when only one of them is given.
    method: "concat" goes through the trained network at both ends and, at one half, with both sides joined; "weighted"
    is the straight line between the two ends; "spherical" the way over the sphere; "gated" lets each place of the
    picture choose its own moment to change.
    A model without a fusion network takes words, and a picture beside them as ``join_tokens`` has it: by "concat" or
    "cross-attention", with the weights of ``adapter``, and strength 1 is then the picture in full beside the words.
    A batch of one meets a batch of any size; otherwise the sizes must agree. Raises ValueError where they do not, where
    a space is another model's, where neither side is given, or where a method is none for this model.
    Words leave open in which of several ways they are drawn: below strength 1 they give as many first pictures.
    """
    known = dict.fromkeys([*METHODS, *TOKEN_METHODS])
    if method not in known:
        raise ValueError(f"method must be one of {', '.join(known)}, got {method!r}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be 0 (words alone) to 1 (picture alone), got {strength}")
    if prompt is None and image is None:
        raise ValueError("expected prompt embeds, image features or both, got neither")
    if not checkpoint.has("fusion"):
        words_alone = _words_alone(checkpoint, prompt)
        if image is None:
            return words_alone
        return join_tokens(cache, words_alone, image, method=method, strength=strength, adapter=adapter)
    if method not in METHODS or adapter is not None:
        asked = f"method {method}" if adapter is None else f"{adapter.name}, the weights of a {adapter.kind}"
        raise ValueError(
            f"{checkpoint.folder.name} has a fusion network: expected {', '.join(METHODS)}, without further weights; "
            f"got {asked}"
        )
    _check_spaces(checkpoint, prompt, image)

    words = prompt.pooled if prompt is not None and prompt.mask.any() else None  # an empty prompt is no prompt
    picture = image.pooled if image is not None else None
    with checkpoint.use(cache, "fusion") as network, torch.inference_mode():
        place = next(network.parameters())
        words, picture = (side.to(place) if side is not None else None for side in (words, picture))
        if words is not None and picture is not None:
            words, picture = _same_batch(words, picture)
            words, picture = (words if strength < 1 else None), (picture if strength > 0 else None)
        if words is not None and picture is not None:
            tokens = METHODS[method](network, words, picture, strength)
        else:
            tokens = network(words, picture)
        grid = (network.config.grid, network.config.grid)
    negative = None
    if prompt is not None and prompt.negative is not None:
        negative = fuse(cache, checkpoint, prompt.negative, image, method=method, strength=strength)
    return FusedConditioning(
        tokens=tokens,
        pooled=None,
        mask=torch.ones(tokens.shape[:2], dtype=torch.bool),
        space=Space(checkpoint.identity_of("fusion"), "latent grid", tokens.shape[-1]),
        grid=grid,
        negative=negative,
        notices=prompt.notices if prompt is not None else (),
    )


def _concat(network: FusionNetwork, words: Tensor, picture: Tensor, strength: float) -> Tensor:
    """A path through the three points that the network was trained on: words, both, picture."""
    both = network(words, picture)
    if strength == 0.5:  # where the dial stands unless it is turned: words alone, in all their ways, would cost thrice
        return both
    if strength < 0.5:
        return _between(network(words, None), both, 2 * strength)
    return _between(both, network(None, picture), 2 * strength - 1)


def _weighted(network: FusionNetwork, words: Tensor, picture: Tensor, strength: float) -> Tensor:
    return _between(*_ends(network, words, picture), strength)


def _gated(network: FusionNetwork, words: Tensor, picture: Tensor, strength: float) -> Tensor:
    """gate = strength ** (|words| / |picture|) at each token: where the picture says more, it takes over earlier."""
    from_words, from_picture = _ends(network, words, picture)
    said = [side.norm(dim=-1, keepdim=True).clamp(min=1e-6) for side in (from_words, from_picture)]
    gate = strength ** (said[0] / said[1])
    return from_words + gate * (from_picture - from_words)


def _spherical(network: FusionNetwork, words: Tensor, picture: Tensor, strength: float) -> Tensor:
    return slerp(*_ends(network, words, picture), strength)


def _ends(network: FusionNetwork, words: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
    """What words alone give, and what the picture alone gives, once beside each of their ways."""
    from_words, from_picture = network(words, None), network(None, picture)
    return from_words, from_picture.repeat(1, from_words.shape[1] // from_picture.shape[1], 1)


METHODS: dict[str, Meet] = {"concat": _concat, "weighted": _weighted, "spherical": _spherical, "gated": _gated}


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Directions over the great circle, lengths in a straight line, along the last axis; exact at both ends.

    Where there is no one great circle, between parallel, opposite or zero vectors, the straight line between them
    (Shoemake 1985, "Animating Rotation with Quaternion Curves").
    """
    if share in (0, 1):
        return end if share else start
    lengths = start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True)
    one, other = (side / length.clamp(min=1e-12) for side, length in zip((start, end), lengths, strict=True))
    # By halves, because the arc cosine of a product is coarse for small angles.
    angle = 2 * torch.atan2((one - other).norm(dim=-1, keepdim=True), (one + other).norm(dim=-1, keepdim=True))
    sine = angle.sin()
    way = (((1 - share) * angle).sin() * one + (share * angle).sin() * other) / sine.clamp(min=1e-12)
    straight = (sine < 1e-4) | (lengths[0] < 1e-12) | (lengths[1] < 1e-12)
    return torch.where(straight, torch.lerp(start, end, share), way * torch.lerp(*lengths, share))


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Exact at the end, which ``torch.lerp`` is not promised to be. The end may be one for several starts."""
    return end if share == 1 else torch.lerp(start, end.repeat(1, start.shape[1] // end.shape[1], 1), share)


def _same_batch(words: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
    sizes = words.shape[0], picture.shape[0]
    if 1 not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"expected batches of one size, or one of them of size 1, got {sizes[0]} prompts and {sizes[1]} pictures"
        )
    return words.expand(max(sizes), -1), picture.expand(max(sizes), -1)


def _check_spaces(checkpoint: Checkpoint, prompt: PromptEmbeds | None, image: ImageFeatures | None) -> None:
    for side, component in ((prompt, "text_encoder"), (image, "image_encoder")):
        if side is not None and side.space.model != checkpoint.identity_of(component):
            raise ValueError(
                f"expected embeddings of {checkpoint.identity_of(component)}, got embeddings of {side.space}"
            )
    if image is not None and image.space.layer != PICTURE_LAYER:
        raise ValueError(
            f"expected {PICTURE_LAYER} of {checkpoint.identity_of('image_encoder')}, got features of {image.space}"
        )


def _words_alone(checkpoint: Checkpoint, prompt: PromptEmbeds | None) -> FusedConditioning:
    if prompt is None:
        raise ValueError(f"expected words: {checkpoint.folder.name} has no fusion network; got image features alone")
    _check_spaces(checkpoint, prompt, None)
    second = prompt.second
    return FusedConditioning(
        tokens=prompt.tokens,
        pooled=prompt.pooled,
        mask=prompt.mask,
        space=prompt.space,
        negative=_words_alone(checkpoint, prompt.negative) if prompt.negative is not None else None,
        notices=prompt.notices,
        second=FusedConditioning(second.tokens, second.pooled, second.mask, second.space) if second else None,
    )
