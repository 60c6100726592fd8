"""The ComfyUI side of Duet: every node, by name. A node converts, calls the pipeline once, and wraps."""

from .fusion import DuetFuse
from .generation import DuetFinishImage, DuetGenerate
from .host import ComfyExtension, io
from .models import DuetLoadModel, DuetModelCache
from .text import DuetEmbedText
from .vision import DuetImageFeatures, DuetPrepareImage

NODES: list[type[io.ComfyNode]] = [
    DuetLoadModel,
    DuetEmbedText,
    DuetPrepareImage,
    DuetImageFeatures,
    DuetFuse,
    DuetGenerate,
    DuetFinishImage,
    DuetModelCache,
]


class DuetExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
