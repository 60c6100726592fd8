"""Pictures are saved, and compressed when the graph has gone on."""

import torch

from .described import described_once
from .host import io, picture_place, picture_saver, picture_texts
from .images import to_pixels
from .stages import stage


class DuetSavePictures(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetSavePictures",
            display_name="Save pictures",
            category="Duet",
            description="Saves pictures as PNG in the output folder, at once; they are compressed while the next is "
            "drawn.",
            inputs=[
                io.Image.Input("image", tooltip="One picture or a batch; RGB or RGBA."),
                io.String.Input(
                    "filename_prefix",
                    default="Duet",
                    tooltip="A name below the output folder, to which a number is added; nothing is overwritten. As in "
                    "Save Image, a/b makes a folder, and %date:yyyy-MM-dd%, %width% and the like are filled in.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="1 where the picture is transparent. Left out, or empty: RGB stays RGB.",
                ),
                io.Boolean.Input(
                    "lift_off_white",
                    default=True,
                    optional=True,
                    tooltip="With a mask. On for pictures of Generate, which come laid over white: soft edges get back "
                    "their own colour. Off for pictures of Load Image.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, filename_prefix: str, mask: torch.Tensor | None = None, lift_off_white: bool = True):
        with stage("Save pictures", "save") as done:
            pixels, opacity = to_pixels(image, mask, lies_over_white=lift_off_white)
            alpha = None if opacity is None else opacity.unsqueeze(1)
            try:
                place, subfolder = picture_place(filename_prefix, pixels.shape[-1], pixels.shape[-2])
                saved = picture_saver().save(place, pixels, alpha, picture_texts(cls.hidden))
            except OSError as error:
                raise type(error)(error.errno, f"Save pictures: {error.strerror or error}") from error
        images = [{"filename": path.name, "subfolder": subfolder, "type": "output"} for path in saved]
        return io.NodeOutput(ui={"images": images, **done.ui()})
