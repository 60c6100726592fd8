"""The ComfyUI side of Duet: every node, by name. A node converts, calls the pipeline once, and wraps."""

from .adapters import DuetIPAdapter, DuetLoadLora
from .doctor import DuetDoctor
from .embeddings import DuetLoadEmbeddings, DuetSaveEmbeddings
from .fusion import DuetFuse
from .generation import DuetFinishImage, DuetGenerate
from .host import ComfyExtension  # pyright: ignore[reportAttributeAccessIssue]  # the host is no package
from .language import DuetDirectPrompt
from .models import DuetLoadModel, DuetModelCache
from .refinement import DuetRefine
from .report import DuetReport
from .saving import DuetSavePictures
from .speed import DuetSpeedPlan
from .stock import (
    DuetConditionFromStock,
    DuetConditionToStock,
    DuetEmbedTextByClip,
    DuetFeaturesFromStock,
    DuetFeaturesToStock,
    DuetModelToStock,
)
from .text import DuetEmbedText, DuetTextEncoder
from .variants import DuetGrid, DuetVariants
from .vision import DuetImageFeatures, DuetPrepareImage

NODES: list[type] = [
    DuetLoadModel,
    DuetEmbedText,
    DuetPrepareImage,
    DuetImageFeatures,
    DuetFuse,
    DuetRefine,
    DuetGenerate,
    DuetFinishImage,
    DuetModelCache,
    DuetSaveEmbeddings,
    DuetLoadEmbeddings,
    DuetDoctor,
    DuetDirectPrompt,
    DuetModelToStock,
    DuetConditionToStock,
    DuetConditionFromStock,
    DuetEmbedTextByClip,
    DuetFeaturesFromStock,
    DuetFeaturesToStock,
    DuetTextEncoder,
    DuetLoadLora,
    DuetIPAdapter,
    DuetSpeedPlan,
    DuetReport,
    DuetSavePictures,
    DuetVariants,
    DuetGrid,
]


class DuetExtension(ComfyExtension):
    async def get_node_list(self) -> list[type]:
        return NODES
