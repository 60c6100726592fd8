"""The model cache, told as text for people and as plain JSON for the page."""

from typing import Any

from ..pipeline.model_cache import CacheStats
from ..pipeline.residency import megabytes


def cache_as_json(stats: CacheStats, embedding_bytes: int) -> dict[str, Any]:
    return {
        "embedding_bytes": embedding_bytes,
        "bytes_held": stats.bytes_held,
        "hits": stats.hits,
        "misses": stats.misses,
        "evictions": stats.evictions,
        "entries": [
            {
                "component": entry.key.component,
                "path": str(entry.key.path),
                "dtype": str(entry.key.dtype).removeprefix("torch."),
                "bytes": entry.bytes,
                "hits": entry.hits,
                "pins": entry.pins,
                "on_device": entry.on_device,
            }
            for entry in stats.entries
        ],
    }


def cache_as_text(stats: CacheStats, embedding_bytes: int) -> str:
    """One line in all, then one line for each model, the most recently used last, and one for embeddings."""
    count = len(stats.entries)
    head = (
        f"{count} {'model' if count == 1 else 'models'}, {megabytes(stats.bytes_held)} held; "
        f"{stats.hits} hits, {stats.misses} misses, {stats.evictions} evictions"
    )
    rows = [
        f"{entry.key.component} of {'/'.join(entry.key.path.parts[-4:-1])}: "
        f"{megabytes(entry.bytes)}, {entry.hits} hits, {'on the device' if entry.on_device else 'in memory'}"
        for entry in stats.entries
    ]
    if embedding_bytes:
        rows.append(f"embeddings made lately: {megabytes(embedding_bytes)}")
    return "\n".join([head, *rows])
