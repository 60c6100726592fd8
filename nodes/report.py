"""What a run cost, and what a shortcut cost in the picture, as a text on the node."""

import math
from typing import Any

from torch import Tensor

from ..nodes import sockets
from ..pipeline.acceleration.measuring import Likeness, psnr, ssim
from ..pipeline.conditioning import GenerationReport
from ..pipeline.residency import megabytes
from .described import described_once
from .host import io
from .images import to_opaque
from .stages import stage

Measured = tuple[Likeness, Likeness]  # PSNR and SSIM


class DuetReport(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetReport",
            display_name="Report",
            category="Duet",
            description="Tells what a run of Generate cost, and how far two pictures are apart: what a shortcut cost.",
            inputs=[
                sockets.Report.Input(
                    "report", optional=True, tooltip="From Generate: time, steps, models, memory, and the loss if the "
                    "plan measures it."
                ),
                io.Image.Input("image", optional=True, tooltip="A picture or a batch, to be measured."),
                io.Image.Input(
                    "reference", optional=True, tooltip="What the image is measured against, such as the same seed "
                    "without a speed plan. Of the same size and number."
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="The same text that the node shows."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, report=None, image=None, reference=None):
        with stage("Report", "comparison") as done:
            measured = None if image is None and reference is None else _measured(image, reference)
            if report is None and measured is None:
                raise ValueError("expected the report of Generate, or an image and a reference; nothing is connected")
        lines = [] if report is None else report_lines(report)
        if measured is not None:
            lines += measured_lines(*measured)
        text = "\n".join(lines)
        shown = {"duet_summary": [text]} if measured is None else done.ui(summary=text)
        return io.NodeOutput(text, ui={"text": [text], "duet_report": [_as_json(report, measured)], **shown})


def report_lines(report: GenerationReport) -> list[str]:
    """One line for each kind of cost."""
    asked = report.steps_computed + report.steps_skipped
    peak = "cannot be told here"
    if report.peak_bytes is not None:
        peak = megabytes(report.peak_bytes)
        peak += " on the device" if report.device.startswith("cuda") else " more than before the run"
    lines = [
        f"plan: {', '.join((report.plan, *report.shortcuts))}",
        f"runs in {report.dtype} on {report.device}",
        *(f"{name}: {spent:,.1f} ms" for name, spent in report.milliseconds.items()),
        f"in all: {sum(report.milliseconds.values()):,.1f} ms",
        f"steps: {report.steps_computed} of {asked} computed in full, {report.steps_skipped} skipped in whole or part",
    ]
    if report.blocks_computed or report.blocks_skipped:
        lines.append(
            f"blocks: {report.blocks_computed:,} of {report.blocks_computed + report.blocks_skipped:,} computed"
        )
    lines += [
        f"models: {megabytes(report.model_bytes)}; {report.cache_hits} times at hand, {report.cache_misses} read",
        f"peak memory: {peak}",
    ]
    if report.retries:
        lines.append(f"done again in float32: {', '.join(report.retries)}")
    if report.psnr is not None and report.ssim is not None:
        lines.append(f"against the same run without shortcuts: {_apart(report.psnr, report.ssim)}")
    return lines


def measured_lines(ratios: Likeness, likenesses: Likeness) -> list[str]:
    """The whole batch first, then each picture where there are several."""
    lines = [f"image against reference: {_apart(ratios.mean, likenesses.mean)}"]
    if len(ratios.each) > 1:
        pairs = enumerate(zip(ratios.each, likenesses.each, strict=True), 1)
        lines += [f"  picture {number}: {_apart(*pair)}" for number, pair in pairs]
    return lines


def _measured(image: Tensor | None, reference: Tensor | None) -> Measured:
    if image is None or reference is None:
        given, missing = ("reference", "image") if image is None else ("image", "reference")
        raise ValueError(f"expected both an image and a reference to measure it against; got {given}, but no {missing}")
    # As they are saved: what lies beyond 0..1 is cut there.
    one, other = (to_opaque(side).clamp(0, 1) for side in (image, reference))
    if one.shape != other.shape:
        sizes = [f"{side.shape[0]} of {side.shape[3]}x{side.shape[2]}" for side in (one, other)]
        raise ValueError(f"expected image and reference of one size and number, got {sizes[0]} and {sizes[1]}")
    return psnr(one, other), ssim(one, other)


def _apart(ratio: float, likeness: float) -> str:
    if math.isinf(ratio):
        return "no difference"
    return f"PSNR {ratio:.2f} dB, SSIM {likeness:.4f}"


def _as_json(report: GenerationReport | None, measured: Measured | None) -> dict[str, Any]:
    """Plain JSON has no infinity: the PSNR of equal pictures is null, and equal says so."""
    told: dict[str, Any] = {}
    if report is not None:
        told |= {
            "plan": report.plan,
            "shortcuts": list(report.shortcuts),
            "milliseconds": {name: round(float(spent), 2) for name, spent in report.milliseconds.items()},
            "steps_computed": int(report.steps_computed),
            "steps_skipped": int(report.steps_skipped),
            "blocks_computed": int(report.blocks_computed),
            "blocks_skipped": int(report.blocks_skipped),
            "dtype": report.dtype,
            "device": report.device,
            "cache_hits": int(report.cache_hits),
            "cache_misses": int(report.cache_misses),
            "model_bytes": int(report.model_bytes),
            "peak_bytes": None if report.peak_bytes is None else int(report.peak_bytes),
            "retries": list(report.retries),
        }
        if report.psnr is not None and report.ssim is not None:
            told["loss"] = _pair(report.psnr, report.ssim)
    if measured is not None:
        ratios, likenesses = measured
        told["measured"] = _pair(ratios.mean, likenesses.mean)
        told["pictures"] = [_pair(*pair) for pair in zip(ratios.each, likenesses.each, strict=True)]
    return told


def _pair(ratio: float, likeness: float) -> dict[str, float | bool | None]:
    equal = math.isinf(ratio)
    return {"psnr": None if equal else float(ratio), "ssim": float(likeness), "equal": equal}
