"""A model in one .safetensors file, or in a few: which family it is, and where each component's tensors lie.

Read from the headers alone. The configurations and tokenizers that such files lack are in ``configs``.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..families import FAMILIES
from ..family import Family
from .components import Component, model_class_allowed, open_component
from .safetensors_files import CheckpointError, TensorEntry, WeightsFile, check_weights, read_json, shown
from .single_file_signs import SIGNS, UNUSABLE, Sign

CONFIGS = Path(__file__).parents[1] / "configs"
_TOKENIZERS = {"CLIPTokenizer": "clip", "T5TokenizerFast": "t5", "Qwen2Tokenizer": "qwen"}
# What the programs that write such files put before the names of a component's tensors.
_DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_VAE_PREFIXES = ("first_stage_model.", "vae.", "")
_ENCODER_PREFIXES = (
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
    "",
)
_GROUPS_SHOWN, _NAMES_SHOWN = 4, 2


@dataclass(frozen=True)
class SingleFile:
    """What a file holds, with the further files that were given for the rest."""

    index: Path
    family: Family
    components: Mapping[str, Component]


def open_single_file(path: Path, further: Sequence[Path] = (), config: Path | None = None) -> SingleFile:
    """The components in a file, and, for those that it lacks, in the ``further`` ones.

    config: a folder as ``configs/<name>``, or a diffusers folder whose weights are not read, in place of what ships.
    Raises CheckpointError that says what was found in the headers.
    """
    main = check_weights(path)
    folder, sign, prefix = _recognise(main, config)
    index_path = folder / "model_index.json"
    index = read_json(index_path)
    family = FAMILIES[index["_class_name"]]
    files = [main, *(check_weights(other) for other in further)]
    components: dict[str, Component] = {}
    taken: set[tuple[Path, str]] = set()
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        if name in ("unet", "transformer"):
            options = sign.options(_without(main.entries, prefix), read_json(folder / name / "config.json"))
            if options.get("in_channels", 4) not in (4, 9) and config is None:
                raise CheckpointError(
                    f"{path}: expected a denoiser of 4 input channels, or of 9 for inpainting, found "
                    f"{options['in_channels']}, as models that change a picture by an instruction have"
                )
            found = _component(folder, name, entry, main, prefix, sign.form)
            components[name] = replace(found, options=options)
        elif model_class_allowed(entry[0], entry[1]):
            source = _find(folder / name / "config.json", entry[1], files, taken)
            if source is not None:
                components[name] = _component(folder, name, entry, *source)
                taken.add((source[0].path, source[1]))
        elif name == "scheduler":
            found = open_component(index_path, name, entry[:2])
            components[name] = replace(found, options=sign.scheduler(main, prefix))
        elif entry[1] in _TOKENIZERS and not (folder / name).is_dir():
            # All of a kind share one folder; a third item of the entry says what is different about this one.
            shared = CONFIGS / "tokenizers" / _TOKENIZERS[entry[1]] / "tokenizer_config.json"
            options = entry[2] if len(entry) > 2 else {}
            components[name] = Component(name, entry[0], entry[1], shared, options=options)
        elif name.startswith("tokenizer"):
            components[name] = open_component(index_path, name, entry[:2])
    lacking = [name for name in family.components if name not in components]
    if lacking:
        wanted = "; ".join(_wanted(name, index[name]) for name in lacking)
        raise CheckpointError(f"{path} is of {family.name} and holds {_held(components)}: expected also {wanted}")
    # An encoder that a family can do without takes its tokenizer along.
    for name in [name for name in components if name.startswith("tokenizer")]:
        if name.replace("tokenizer", "text_encoder") not in components:
            del components[name]
    unused = [file.path for file in files[1:] if not any(file.path in part.weights for part in components.values())]
    if unused:
        found = in_words(check_weights(unused[0]))
        raise CheckpointError(f"{unused[0]} holds nothing that {path.name}, of {family.name}, lacks. {found}")
    return SingleFile(index_path, family, components)


def fitting_files(path: Path, candidates: Iterable[Path], given: Sequence[Path] = ()) -> dict[str, list[Path]]:
    """For each component that a file and the ``given`` ones lack, the candidates that could be it, by their headers."""
    main = check_weights(path)
    folder, _, _ = _recognise(main, None)
    held = [main, *map(check_weights, given)]
    taken: set[tuple[Path, str]] = set()
    lacking: dict[str, tuple[Path, str]] = {}
    for name, entry in read_json(folder / "model_index.json").items():
        if not isinstance(entry, list) or name in ("unet", "transformer") or not model_class_allowed(*entry[:2]):
            continue
        config = folder / name / "config.json"
        if (source := _find(config, entry[1], held, taken)) is not None:
            taken.add((source[0].path, source[1]))
        else:
            lacking[name] = config, entry[1]
    headers = []
    for candidate in candidates if lacking else ():
        try:
            headers.append(check_weights(candidate))
        except CheckpointError:
            continue  # nobody has asked for this one
    return {
        name: [file.path for file in headers if _find(config, class_name, [file], set())]
        for name, (config, class_name) in lacking.items()
    }


def _recognise(file: WeightsFile, config: Path | None) -> tuple[Path, Sign, str]:
    """The folder of configurations, the layout of the denoiser and the prefix of its names."""
    pipeline = read_json(config / "model_index.json").get("_class_name") if config else None
    if config and pipeline not in FAMILIES:
        raise CheckpointError(f"{config}: expected a model_index.json of a known family, found {shown(pipeline)}")
    for prefix in _DENOISER_PREFIXES:
        entries = _without(file.entries, prefix)
        for sign in SIGNS:
            if sign.fits(entries, exactly=config is None) and pipeline in (None, _pipeline(sign)):
                return config or CONFIGS / sign.layout, sign, prefix
        for told, marks in UNUSABLE.items():
            if all(mark in entries for mark in marks):
                raise CheckpointError(f"{file.path} is {told}. {in_words(file)}")
    known = ", ".join(sorted({FAMILIES[_pipeline(sign)].name for sign in SIGNS}))
    raise CheckpointError(f"{file.path}: expected the denoiser of {known}. {in_words(file)}")


def _pipeline(sign: Sign) -> str:
    return read_json(CONFIGS / sign.layout / "model_index.json")["_class_name"]


def _find(
    config_path: Path, class_name: str, files: Sequence[WeightsFile], taken: set[tuple[Path, str]]
) -> tuple[WeightsFile, str, str] | None:
    """The file, the prefix and the layout of a component; not one that another component has taken."""
    config = read_json(config_path)
    for file in files:
        for prefix in _prefixes(class_name, file):
            form = _form(class_name, config, _without(file.entries, prefix))
            if form and (file.path, prefix) not in taken:
                return file, prefix, form
    return None


def _prefixes(class_name: str, file: WeightsFile) -> list[str]:
    if class_name.startswith("Autoencoder"):
        return list(_VAE_PREFIXES)
    bundled = {match[0] for name in file.entries if (match := re.match(r"text_encoders\.\w+\.transformer\.", name))}
    return [*sorted(bundled, reverse=True), *_ENCODER_PREFIXES]  # clip_l before clip_g


def _form(class_name: str, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> str | None:
    """In which layout a component of this class and these sizes lies among ``entries``; None where it does not."""

    def is_shaped(name: str, dimension: int, size: int) -> bool:
        return name in entries and entries[name].shape[dimension : dimension + 1] == (size,)

    if class_name.startswith("CLIPText"):
        width = config["hidden_size"]
        for start in ("text_model.", ""):
            if is_shaped(f"{start}embeddings.token_embedding.weight", 1, width):
                return "clip"
        return "open_clip" if is_shaped("token_embedding.weight", 1, width) else None
    if class_name == "T5EncoderModel":
        same_words = is_shaped("shared.weight", 0, config["vocab_size"])
        return "as_is" if same_words and is_shaped("shared.weight", 1, config["d_model"]) else None
    if class_name.startswith("Qwen"):
        text = config.get("text_config", config)
        places = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")
        return "as_is" if any(is_shaped(name, 1, text["hidden_size"]) for name in places) else None
    if class_name == "AutoencoderKLQwenImage":
        return "wan_vae" if is_shaped("decoder.conv1.weight", 1, config["z_dim"]) else None
    if is_shaped("decoder.conv_in.weight", 1, config.get("latent_channels", 0)):
        if ("bn.running_mean" in entries) != (class_name == "AutoencoderKLFlux2"):
            return None
        if "decoder.mid.block_1.norm1.weight" in entries:
            return "ldm_vae"
        return "as_is" if "decoder.mid_block.resnets.0.norm1.weight" in entries else None
    return None


def _component(folder: Path, name: str, entry: list[Any], file: WeightsFile, prefix: str, form: str) -> Component:
    config = folder / name / "config.json"
    return Component(name, entry[0], entry[1], config, (file.path,), digest=file.digest, form=form, prefix=prefix)


def _without(entries: Mapping[str, TensorEntry], prefix: str) -> Mapping[str, TensorEntry]:
    if not prefix:
        return entries
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def _wanted(name: str, entry: list[Any]) -> str:
    usual = entry[2].get("file") if len(entry) > 2 else None
    where = "vae" if name == "vae" else "text_encoders"
    return f"{name} ({entry[1]}), usually {usual} in models/{where}" if usual else f"{name} ({entry[1]})"


def _held(components: Mapping[str, Component]) -> str:
    return ", ".join(name for name, part in components.items() if part.weights)


def in_words(file: WeightsFile) -> str:
    """For an error: what a header lists, shortly."""
    if any(".lora_" in name or ".lora." in name or "lora_A" in name for name in file.entries):
        return f"Its header lists {file.tensors} tensors of a LoRA, which changes a model and is none"
    groups = Counter(re.match(r"[^.]*(\.diffusion_model)?", name)[0] for name in file.entries)  # type: ignore[index]
    counted = ", ".join(f"{number} of {group}" for group, number in groups.most_common(_GROUPS_SHOWN))
    some = [f"{name} {list(entry.shape)}" for name, entry in list(file.entries.items())[:_NAMES_SHOWN]]
    return f"Its header lists {file.tensors} tensors, {shown(counted)}, such as {shown('; '.join(some))}"
