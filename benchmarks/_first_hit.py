"""What a new process does for a prompt that is in the store, timed; for ``python -m benchmarks cache``.

It imports what a node imports, and no model's class. Prints milliseconds by the clock and by the process.
"""

import sys
import time
from pathlib import Path

from pipeline.checkpoints import open_checkpoint
from pipeline.files.content import Digests
from pipeline.model_cache import ModelCache
from pipeline.residency import TorchResidency
from pipeline.store.embedding_store import EmbeddingStore
from pipeline.store.recall import recalled
from pipeline.text_encoder import encode_prompt


def main(embeddings: Path, model: Path, digests: Path) -> None:
    checkpoint = open_checkpoint(model, digests=Digests(digests))  # by Load model, before
    cache = ModelCache(TorchResidency("cpu"), budget_bytes=2**34)
    wall, cpu = time.perf_counter(), time.process_time()
    store = EmbeddingStore(embeddings, 10**9)
    recalled(store, encode_prompt, cache, checkpoint, "a b 0", None)
    spent = time.perf_counter() - wall, time.process_time() - cpu
    assert (store.hits, cache.stats().misses) == (1, 0), "it was not in the store"
    print(*(1000 * each for each in spent))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
