import shutil
from pathlib import Path

import pytest

from pipeline.checkpoints import Checkpoint, open_checkpoint
from pipeline.mini import MODEL_FOLDER
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
from tests.pipeline.folders import save_mini, save_stable_diffusion


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_mini(root / "mini")
    save_stable_diffusion(root / "sd15")
    return root


@pytest.fixture
def mini(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved / "mini", tmp_path / "mini"))


@pytest.fixture
def cache() -> ModelCache:
    return ModelCache(TorchResidency("cpu"), budget_bytes=2**30)


@pytest.fixture(scope="session")
def shipped() -> Checkpoint:
    """The small model as it ships."""
    return open_checkpoint(MODEL_FOLDER)


@pytest.fixture(scope="session")
def warm() -> ModelCache:
    """One for the whole session, so that weights are read once."""
    return ModelCache(TorchResidency("cpu"), budget_bytes=2**32)
