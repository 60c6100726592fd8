"""An artist's session as a sequence of uses of models, and the fewest bytes that any cache could reload for it.

Sizes are those of the published bfloat16 and float16 weights. A session is a row of projects, each with four favourite
workflows; in a project one workflow is run again and again with new words and seeds, or several are compared on the
same words, or one draws what another finishes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

MEGABYTE = 10**6
SIZES = {
    name: megabytes * MEGABYTE
    for name, megabytes in {
        "clip-l": 246, "clip-g": 1390, "t5-xxl": 9524, "qwen3-4b": 8045, "gemma-2b": 5229, "language model": 3087,
        "clip-vision-h": 1264, "dinov2-b": 346,
        "sd15 unet": 1719, "sdxl unet": 5135, "sdxl finetuned unet": 5135, "flux-dev": 23802, "flux-schnell": 23782,
        "z-image": 12310, "sana": 3207,
        "sd15 vae": 167, "sdxl vae": 167, "flux vae": 168, "sana dc-ae": 1249,
        "mini words": 9, "mini eye": 6, "mini fusion": 9, "mini unet": 9, "mini vae": 5,
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class Workflow:
    """What reads new words, what looks at a new picture, and what draws, each in the order of its use."""

    words: tuple[str, ...]
    picture: tuple[str, ...]
    draw: tuple[str, ...]


WORKFLOWS = (
    Workflow(("mini words",), ("mini eye",), ("mini fusion", "mini unet", "mini vae")),
    Workflow(("clip-l",), ("clip-vision-h",), ("sd15 unet", "sd15 vae")),
    Workflow(("clip-l", "clip-g"), ("clip-vision-h",), ("sdxl unet", "sdxl vae")),
    Workflow(("clip-l", "clip-g"), ("clip-vision-h",), ("sdxl finetuned unet", "sdxl vae")),
    Workflow(("clip-l", "t5-xxl"), ("clip-vision-h",), ("flux-dev", "flux vae")),
    Workflow(("clip-l", "t5-xxl"), ("clip-vision-h",), ("flux-schnell", "flux vae")),
    Workflow(("qwen3-4b",), ("dinov2-b",), ("z-image", "flux vae")),
    Workflow(("gemma-2b",), ("dinov2-b",), ("sana", "sana dc-ae")),
)


def session(seed: int, uses: int = 1000) -> list[str]:
    """Which models are used, in order."""
    chance = random.Random(seed)
    sequence: list[str] = []

    def run(workflow: Workflow, words: float, picture: float, brief: float = 0.0) -> None:
        """Each a probability: that the words are new, the picture is, and that a language model wrote the words."""
        if chance.random() < words:
            sequence.extend(("language model",) if chance.random() < brief else ())
            sequence.extend(workflow.words)
        sequence.extend(workflow.picture if chance.random() < picture else ())
        sequence.extend(workflow.draw)

    while len(sequence) < uses:
        favourites = chance.sample(WORKFLOWS, 4)
        for _ in range(chance.randint(3, 7)):
            habit = chance.choices(("explore", "compare", "finish"), (5, 3, 2))[0]
            if habit == "explore":
                workflow = chance.choices(favourites, (8, 4, 2, 1))[0]
                brief = chance.choice((0.0, 0.0, 1.0))
                for _ in range(1 + int(chance.expovariate(1 / 6))):
                    run(workflow, words=0.5, picture=0.15, brief=brief)
            elif habit == "compare":
                compared = chance.sample(favourites, chance.choice((2, 2, 3)))
                for _ in range(1 + int(chance.expovariate(1 / 5))):
                    for workflow in compared:
                        run(workflow, words=0.7, picture=0.0)
            else:
                sketch, finish = chance.sample(favourites, 2)
                for _ in range(1 + int(chance.expovariate(1 / 4))):
                    run(sketch, words=1.0, picture=0.0)
                    run(finish, words=1.0, picture=1.0)
    return sequence[:uses]


def fewest_bytes(sequence: Sequence[str], budget: int) -> tuple[int, int]:
    """What the best of all caches would load, which knows the future: (found, bound), equal up to 0.01 percent.

    An integer programme: between two uses of a model it is either kept whole or not at all; at each use what is kept
    and what is used fit the budget together. Belady's rule is its solution for models of one size. As here, a model
    may be let go at any time and must be held while it is used. Bytes of a first use count too.
    """
    last: dict[str, int] = {}
    kept: list[tuple[int, int, int]] = []
    for now, name in enumerate(sequence):
        if name in last:
            kept.append((last[name], now, SIZES[name]))
        last[name] = now
    places = [(now, column) for column, (start, end, _) in enumerate(kept) for now in range(start + 1, end)]
    rows, columns = np.array(places).T
    sizes = np.array([size for _, _, size in kept]) / MEGABYTE
    matrix = csr_array((sizes[columns], (rows, columns)), shape=(len(sequence), len(kept)))
    room = (budget - np.array([SIZES[name] for name in sequence])) / MEGABYTE
    fits = LinearConstraint(matrix, -np.inf, room)  # type: ignore[arg-type]  # takes one bound for all
    found = milp(
        -sizes, constraints=fits, integrality=np.ones(len(kept)), bounds=Bounds(0, 1), options={"mip_rel_gap": 1e-4}
    )
    everything = sum(SIZES[name] for name in sequence)
    return everything + int(found.fun * MEGABYTE), everything + int(found.mip_dual_bound * MEGABYTE)
