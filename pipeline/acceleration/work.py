"""What a run has computed and what it has taken from a cache, counted while it goes on."""

from dataclasses import dataclass


@dataclass
class Work:
    """Counters of one run, all from 0. The caches add to them; whoever made it reads them at the end.

    steps_computed, steps_from_cache: calls of the denoiser that ran all of it, and that took part or all of their
    prediction from an earlier call. Guidance in two calls counts each; guidance as one doubled batch counts once.
    blocks_computed, blocks_skipped: of the denoiser, in those calls; a block that ran in part is computed.
    """

    steps_computed: int = 0
    steps_from_cache: int = 0
    blocks_computed: int = 0
    blocks_skipped: int = 0
