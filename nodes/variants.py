"""Many pictures as one job: seeds of one condition, or a grid of prompts, seeds and strengths."""

import math

from ..nodes import inputs, sockets
from ..pipeline.contact_sheet import contact_sheet
from ..pipeline.grid import Cell, draw_grid, draw_variants, read_prompts, read_strengths
from ..pipeline.speed_plan import EXACT
from .choices import check_choice
from .described import described_once
from .fusion import METHODS
from .generation import report_steps
from .host import embedding_store, io, model_cache
from .images import over_white, to_image, to_mask, to_opaque, to_pixels
from .speed import as_line
from .stages import stage

MOST_SEEDS = 1024


class DuetVariants(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetVariants",
            display_name="Variants",
            category="Duet",
            description="Draws one condition with many seeds as one job, and lays the pictures out on a sheet.",
            inputs=[
                sockets.Model.Input("model", tooltip="The model that draws."),
                sockets.Conditioning.Input("conditioning", tooltip="What to draw, from Fuse."),
                inputs.seed(
                    "The first seed; the next picture has the next. Each is the picture that Generate gives "
                    "with that seed."
                ),
                io.Int.Input("count", default=8, min=1, max=MOST_SEEDS, tooltip="How many pictures."),
                *_how(),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture to draw from, cut to the size above, for models whose family draws from "
                    "pictures.",
                ),
                inputs.denoise("How much of the picture is replaced. Without a picture it has no effect."),
                _plan(),
            ],
            outputs=_outputs(
                "The pictures row by row, beside each row its seeds.",
                "One line for each picture: its number and its seed.",
            ),
        )

    @classmethod
    def execute(
        cls,
        model,
        conditioning,
        seed: int,
        count: int,
        steps: int,
        guidance_scale: float,
        width: int,
        height: int,
        at_once: int,
        image=None,
        denoise: float = 0.6,
        speed_plan=None,
    ):
        seeds = [(seed + number) % 2**64 for number in range(count)]
        plan = speed_plan or EXACT
        with stage("Variants", "generation") as done:
            pictures = draw_variants(
                model_cache(),
                model,
                conditioning,
                seeds,
                at_once=at_once,
                **inputs.chosen(steps, guidance_scale),
                width=width,
                height=height,
                image=None if image is None else to_opaque(image),
                strength=denoise,
                plan=plan,
                on_step=report_steps(model, plan),
            )
        shown = over_white(pictures.pixels, pictures.alpha)
        columns = math.ceil(math.sqrt(count))
        rows = [seeds[first : first + columns] for first in range(0, count, columns)]
        sheet = contact_sheet(shown, columns, [f"seed {row[0]} to {row[-1]}" for row in rows])
        legend = "\n".join(f"{number}: seed {one}" for number, one in enumerate(seeds, 1))
        said = done.ui(pictures.notices, pictures.milliseconds, as_line(pictures.report))
        return io.NodeOutput(to_image(shown), to_mask(pictures.alpha), to_image(sheet.pixels), legend, ui=said)


class DuetGrid(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetGrid",
            display_name="Grid",
            category="Duet",
            description="Draws every prompt with every seed and every strength of a picture, as one job, and lays them "
            "out on a labelled sheet.",
            inputs=[
                sockets.Model.Input("model", tooltip="The model that reads, looks, fuses and draws."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a red rose\na blue car",
                    tooltip="One prompt a line; empty lines are passed over. A prompt is read once, however many "
                    "pictures it makes.",
                ),
                inputs.seed("The first seed."),
                io.Int.Input("seeds", default=2, min=1, max=MOST_SEEDS, tooltip="How many seeds, one after the other."),
                io.String.Input(
                    "strengths",
                    default="0, 0.5, 1",
                    tooltip="Fuse's strength, as numbers from 0 (words alone) to 1 (picture alone) with commas "
                    "between. Without a picture they have no effect.",
                ),
                *_how(),
                io.Image.Input("image", optional=True, tooltip="A picture for all of them, looked at once."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the picture does not count: 1 where it is transparent."
                ),
                io.Combo.Input(
                    "method",
                    options=METHODS,
                    default="concat",
                    optional=True,
                    tooltip="How words and picture meet, as in Fuse.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What no picture should show. It acts only where the guidance scale is above 1.",
                ),
                _plan(),
            ],
            outputs=_outputs(
                "A row for each prompt and seed, a column for each strength; what cannot be written is numbered.",
                "One line for each picture: its number, prompt, seed and strength.",
            ),
        )

    @classmethod
    def validate_inputs(cls, method: str | None = None) -> bool | str:
        return check_choice("Grid", "method", method, METHODS)

    @classmethod
    def execute(
        cls,
        model,
        prompts: str,
        seed: int,
        seeds: int,
        strengths: str,
        steps: int,
        guidance_scale: float,
        width: int,
        height: int,
        at_once: int,
        image=None,
        mask=None,
        method: str = "concat",
        negative_prompt: str = "",
        speed_plan=None,
    ):
        plan = speed_plan or EXACT
        with stage("Grid", "generation") as done:
            pixels, opacity = (None, None) if image is None else to_pixels(image, mask)
            grid = draw_grid(
                model_cache(),
                model,
                read_prompts(prompts),
                [(seed + number) % 2**64 for number in range(seeds)],
                read_strengths(strengths),
                negative_prompt=negative_prompt or None,
                image=pixels,
                mask=opacity,
                method=method,
                at_once=at_once,
                store=embedding_store(),
                on_step=report_steps(model, plan),
                **inputs.chosen(steps, guidance_scale),
                width=width,
                height=height,
                plan=plan,
            )
            shown = over_white(grid.pictures.pixels, grid.pictures.alpha)
            sheet = contact_sheet(shown, grid.columns, grid.row_labels, grid.column_labels)
        legend = "\n".join([*sheet.legend, *(f"{number}: {_said(cell)}" for number, cell in enumerate(grid.cells, 1))])
        pictures = grid.pictures
        said = done.ui(pictures.notices, pictures.milliseconds, as_line(pictures.report))
        return io.NodeOutput(to_image(shown), to_mask(pictures.alpha), to_image(sheet.pixels), legend, ui=said)


def _how() -> list:
    return [
        inputs.steps(),
        inputs.guidance_scale("How hard to hold to the words. 1 is plain and fastest."),
        *inputs.size("each picture"),
        io.Int.Input(
            "at_once",
            default=8,
            min=1,
            max=64,
            tooltip="How many are drawn in one batch. More is faster where memory allows; fewer need less of it.",
        ),
    ]


def _plan():
    return sockets.SpeedPlan.Input(
        "speed_plan", optional=True, tooltip="Which shortcuts to take, from Speed plan. Left out: none."
    )


def _outputs(sheet: str, legend: str) -> list:
    return [
        io.Image.Output("pictures", display_name="image", tooltip="The pictures, RGB, laid over white."),
        io.Mask.Output("pictures_mask", display_name="mask", tooltip="1 where a picture is transparent: 1 - alpha."),
        io.Image.Output("contact_sheet", display_name="contact sheet", tooltip=sheet),
        io.String.Output("legend", display_name="legend", tooltip=legend),
    ]


def _said(cell: Cell) -> str:
    words = f"{cell.prompt}, seed {cell.seed}"
    return words if cell.strength is None else f"{words}, strength {cell.strength:g}"
