"""Draw how training went: ``python -m pipeline.mini.curves docs/mini-curves.png WORK [WORK ...]``.

One panel for each stage, one line for each of its losses, from the curves that ``loop.run_stage`` wrote. Of several
work folders each goes on where the one before ended, after a grey line. Needs the optional group ``train``.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Curve = Mapping[str, np.ndarray]  # "step" and each loss, by name, all of one length

STAGES = ("text", "vision", "autoencoder", "reader", "fusion", "choice", "generator", "finish", "retouch")
COLUMNS = 3
# Read together with the others they would flatten the axis, and say little: sizes of latents, who is fooled, and how
# far further steps lead from where the first one does.
LEFT_OUT = frozenset({"step", "size", "adversary", "fooling", "smoothness", "flow"})


def read_curves(folders: Sequence[Path]) -> dict[str, list[Curve]]:
    """By stage, one curve for each folder that has it. Raises ValueError where there is none at all."""
    found: dict[str, list[Curve]] = {}
    for stage in STAGES:
        for folder in folders:
            path = folder / f"{stage}-curve.csv"
            if path.exists():
                with path.open(newline="") as stream:
                    rows = list(csv.DictReader(stream))
                if rows:
                    curve = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
                    found.setdefault(stage, []).append(curve)
    if not found:
        raise ValueError(f"expected curves such as fusion-curve.csv in {', '.join(map(str, folders))}, found none")
    return found


def draw_curves(curves: Mapping[str, Sequence[Curve]]) -> Any:
    """A figure of matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained", dpi=100)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (stage, runs), panel in zip(curves.items(), panels, strict=False):
        names = list(dict.fromkeys(name for run in runs for name in run if name not in LEFT_OUT))
        begins = 0.0
        for number, run in enumerate(runs):
            if number:
                panel.axvline(begins, color="0.75", linewidth=1)
            for place, name in enumerate(names):
                if name in run:
                    label = name if number == min(n for n, other in enumerate(runs) if name in other) else None
                    steps = begins + run["step"]
                    losses = np.where(run[name] > 0, run[name], np.nan)  # 0 where no example could have one
                    panel.plot(steps, losses, f"C{place}.-", markersize=3, linewidth=1.2, label=label)
            begins += float(run["step"][-1])
        panel.set_title(stage, loc="left", fontsize=10)
        panel.set_yscale("log")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8, frameon=False)
    for panel in panels:  # those that are left over
        panel.set_axis_off()
    figure.supxlabel("steps", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("work", type=Path, nargs="+")
    chosen = parser.parse_args(arguments)
    draw_curves(read_curves(chosen.work)).savefig(chosen.target)


if __name__ == "__main__":
    main()
