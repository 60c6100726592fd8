"""The host's language models, as names for a choice and as what lies behind a name."""

from pathlib import Path

from ..pipeline.language.language_folders import find_language_model, language_model_names
from ..pipeline.language.language_model import LanguageModel, open_language_model
from .host import model_folders, weights_digests

NO_MODEL = "none (the brief as it is)"


def language_names() -> list[str]:
    return [NO_MODEL, *language_model_names(language_roots())]


def open_named(name: str) -> LanguageModel:
    return open_language_model(find_language_model(language_roots(), name), weights_digests())


def fingerprint(name: str | None) -> str | float:
    """Another one as soon as a file of the model is replaced."""
    if name is None:  # it comes from another node, and is not known yet: run
        return float("nan")
    if name == NO_MODEL:
        return name
    try:
        return open_named(name).identity
    except ValueError as error:
        return str(error)


def language_roots() -> dict[str, list[Path]]:
    """models/LLM is where packs that bring a language model look; most of them do not tell the host."""
    folders = model_folders()
    encoders = folders.get("text_encoders", [])
    models = dict.fromkeys([*folders.get("LLM", []), *(root.parent / "LLM" for root in encoders)])
    return {"LLM": list(models), "text_encoders": encoders}
