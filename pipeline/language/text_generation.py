"""A language model continues a text: seeded, watched token by token, and stopped where the caller says."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

# (tokens written so far, text written so far). May raise, which ends the writing within a token.
OnText = Callable[[int, str], None]
_TOP_P = 0.9  # arXiv 1904.09751


class Writer:
    """Continues one prompt, which the model reads once, as often as wanted; each continuation goes on with the seed.

    module: in use, on its device. seed: of a generator of its own, so that no global random state is touched;
    temperature: 0 takes the likeliest token, else tokens are drawn (top-p 0.9). Raises ValueError when the prompt and
    ``room`` new tokens are longer than the model's window.
    """

    def __init__(
        self, module: Any, tokenizer: Any, prompt: str, *, seed: int, temperature: float, room: int, on_text: OnText
    ) -> None:
        self.module, self.tokenizer, self.on_text = module, tokenizer, on_text
        self.written = 0  # tokens
        self._read: DynamicCache | None = None  # keys and values of the prompt
        # Its name changed with transformers 5.
        known = inspect.signature(module.prepare_inputs_for_generation).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        self._ids = tokenizer(prompt, add_special_tokens=False).input_ids
        self._check_room(len(self._ids), room)
        told = module.generation_config.eos_token_id
        ends = [tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])]
        self._ends = sorted({number for number in ends if isinstance(number, int)})
        self._processors = LogitsProcessorList()
        if temperature > 0:
            generator = torch.Generator().manual_seed(seed)
            self._processors = LogitsProcessorList(
                [TemperatureLogitsWarper(temperature), TopPLogitsWarper(_TOP_P), _Draw(generator)]
            )

    def write(self, start: str, max_new_tokens: int, ends: Callable[[str], bool]) -> str:
        """What follows the prompt and ``start``, until ``ends`` says so of the new text, or the model ends it.

        If neither did within ``max_new_tokens``, the last word, or what follows the last comma, is half and left out.
        """
        ids = self._ids + self.tokenizer(start, add_special_tokens=False).input_ids
        self._check_room(len(ids), max_new_tokens)
        device = self.module.device
        everything = torch.tensor([ids], device=device)
        with torch.inference_mode():
            self.on_text(self.written, start)
            if self._read is None:  # all but one token: something must be left to go on from
                read = DynamicCache(config=self.module.config)
                prompt = everything[:, : len(self._ids) - 1]
                self.module.base_model(input_ids=prompt, use_cache=True, **{self._cache_name: read})
                self._read = read
            watch = _Watch(self, start, len(ids), ends)
            ids_after = self.module.generate(
                everything,
                attention_mask=torch.ones_like(everything),
                **{self._cache_name: copy.deepcopy(self._read)},
                max_new_tokens=max_new_tokens,
                do_sample=False,  # the processors draw
                num_beams=1,
                logits_processor=self._processors,
                stopping_criteria=[watch],
                pad_token_id=self.tokenizer.pad_token_id or 0,
                eos_token_id=self._ends,
            )
        whole = ends(watch.text) or int(ids_after[0, -1]) in self._ends
        return watch.text if whole else _without_half(watch.text)

    def _check_room(self, there: int, new: int) -> None:
        window = getattr(self.module.config, "max_position_embeddings", None)
        if window and there + new > window:
            raise ValueError(
                f"expected a brief and new tokens that fit the model's window of {window:,} tokens, got {there:,} "
                f"tokens with the instructions, and {new:,} new ones"
            )


def _without_half(text: str) -> str:
    for mark in (",", "\uff0c", " "):
        if (place := text.rfind(mark)) > 0:
            return text[:place]
    return text


class _Watch(StoppingCriteria):
    def __init__(self, writer: Writer, start: str, length: int, ends: Callable[[str], bool]) -> None:
        self.writer, self.start, self.length, self.ends = writer, start, length, ends
        self.text = ""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.writer.written += 1
        self.text = self.writer.tokenizer.decode(input_ids[0, self.length :], skip_special_tokens=True)
        self.writer.on_text(self.writer.written, self.start + self.text)
        return torch.full((1,), self.ends(self.text), dtype=torch.bool, device=input_ids.device)


class _Draw(LogitsProcessor):
    """The Gumbel-max trick: the largest of logits + Gumbel noise is a draw from their softmax (arXiv 1411.0030)."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # On the CPU, so that a seed writes the same on every device.
        noise = torch.empty(scores.shape).exponential_(generator=self.generator).log_().neg_()
        return scores + noise.to(scores.device)
