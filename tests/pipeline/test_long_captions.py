"""Long captions say one thing, first, among much that is not it; and the model that ships passes over what is not."""

import random

import pytest
import torch
import torch.nn.functional as F

from pipeline.checkpoints import Checkpoint
from pipeline.mini.long_captions import FURTHER_WORDS, long_caption, words_of
from pipeline.model_cache import ModelCache
from pipeline.text_encoder import encode_prompt

NAMES = {"en": ["rocket", "castle", "pizza", "robot"], "zh": ["火箭", "城堡", "披萨", "机器人"]}
WORDS = ["ladder", "gentle", "stone", "梯子", "温和", "石头"]


@pytest.mark.parametrize("language", FURTHER_WORDS)
def test_a_long_caption_names_one_thing_and_says_more(language: str):
    pick = random.Random(3)
    name, *others = NAMES[language]
    made = [long_caption(name, language, others, words_of(language, WORDS), pick) for _ in range(300)]
    assert all(text.count(name) == 1 and len(text) > len(name) for text in made)
    assert len(set(made)) > 250
    for text in made:  # another thing is never said before it
        assert all(text.find(other) == -1 or text.find(other) > text.find(name) for other in others), text
    assert any(other in text for text in made for other in others)


@pytest.mark.parametrize("language", FURTHER_WORDS)
def test_no_word_of_the_other_language_is_mixed_in(language: str):
    pick = random.Random(4)
    name, *others = NAMES[language]
    made = "".join(long_caption(name, language, others, words_of(language, WORDS), pick) for _ in range(300))
    assert made.isascii() == (language == "en")
    assert language == "en" or not any("a" <= letter <= "z" for letter in made.lower())


LONG_PROMPTS = {
    "rocket": "rocket, night photograph, moon, night camera, muted blue, grey",
    "castle": "a castle in the rain, night photograph, low winter sun, pale blue",
    "robot": "a robot reading a newspaper on the sofa of my aunt",
    "pizza": "a slice of hot pizza on a chequered cloth, food photograph, warm light, close-up",
    "rose": "一朵美丽的玫瑰花，清晨的露水，柔和的光，浅景深，高清",
    "cat": "一只猫坐在屋顶上，月光，宁静",
}


def test_the_text_encoder_finds_the_thing_in_a_long_prompt(warm: ModelCache, shipped: Checkpoint):
    def embedded(texts: list[str]) -> torch.Tensor:
        found = [encode_prompt(warm, shipped, text).pooled for text in texts]
        return F.normalize(torch.cat([vector for vector in found if vector is not None]), dim=-1)

    others = ["moon", "camera", "sun", "book", "house", "umbrella", "heart", "fire", "tree", "flower bouquet"]
    names = [*LONG_PROMPTS, *others]
    likeness = embedded(list(LONG_PROMPTS.values())) @ embedded(names).T
    nearest = [names[int(row.argmax())] for row in likeness]
    assert nearest == list(LONG_PROMPTS), nearest
