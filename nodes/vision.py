"""A picture is prepared, and becomes features."""

from ..nodes import inputs, sockets
from ..pipeline.image_encoder import encode_image
from ..pipeline.image_preparation import Augmentation, prepare_image
from ..pipeline.store.recall import recalled
from ..pipeline.vision.image_encoders import ImageEncoder, open_image_encoder
from .choices import check_choice
from .described import described_once
from .host import embedding_store, io, model_cache, weights_digests
from .images import to_image, to_mask, to_pixels
from .model_files import fingerprint, model_names, model_path
from .stages import stage

FITS = ["crop", "pad", "stretch"]
NORMALISATIONS = ["none", "range", "mean-std"]
ENCODERS = ["model", "efficientnet-lite0"]
REGIONS = ["white", "pool"]
BATCHES = ["keep", "average"]
MASK_TOOLTIP = "Where the picture does not count: 1 where it is transparent, as Load Image gives it."


class DuetPrepareImage(io.ComfyNode):
    @classmethod
    @described_once()
    def define_schema(cls):
        return io.Schema(
            node_id="DuetPrepareImage",
            display_name="Prepare image",
            category="Duet",
            description="Makes a picture square, scales it to [0, 1], normalises it and varies it by chance.",
            inputs=[
                io.Image.Input("image", tooltip="One picture or a batch; grey, RGB or RGBA."),
                io.Mask.Input("mask", optional=True, tooltip=MASK_TOOLTIP),
                io.Int.Input("size", default=64, min=8, max=2048, tooltip="Width and height of the result, in pixels."),
                io.Combo.Input(
                    "fit",
                    options=FITS,
                    default="crop",
                    tooltip="crop: fill the square and cut what sticks out. pad: show all and leave the rest "
                    "transparent. stretch: squeeze to the square.",
                ),
                io.Combo.Input(
                    "normalise",
                    options=NORMALISATIONS,
                    default="none",
                    tooltip="All stay in [0, 1]. none: as it is. range: each picture's darkest value at 0 and its "
                    "brightest at 1. mean-std: each picture's mean at the middle, two deviations to either end.",
                ),
                io.Float.Input(
                    "rotate_degrees",
                    default=0.0,
                    min=0.0,
                    max=180.0,
                    step=1.0,
                    tooltip="The largest random turn to either side. 0 turns nothing.",
                ),
                io.Boolean.Input("flip", default=False, tooltip="Mirror every second picture or so, by chance."),
                io.Float.Input(
                    "scale_range",
                    default=0.0,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip="The largest random change of scale: 0.2 draws from 0.8 to 1.2. 0 changes nothing.",
                ),
                inputs.seed("The same seed varies the same batch in the same way."),
            ],
            outputs=[
                io.Image.Output("prepared", display_name="image", tooltip="The prepared pictures, RGB, size x size."),
                io.Mask.Output(
                    "prepared_mask", display_name="mask", tooltip="1 where it does not count: transparent or padded."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, fit: str | None = None, normalise: str | None = None) -> bool | str:
        fits = check_choice("Prepare image", "fit", fit, FITS)
        return fits if fits is not True else check_choice("Prepare image", "normalise", normalise, NORMALISATIONS)

    @classmethod
    def execute(
        cls,
        image,
        size: int,
        fit: str,
        normalise: str,
        rotate_degrees: float,
        flip: bool,
        scale_range: float,
        seed: int,
        mask=None,
    ):
        augmentation = Augmentation(rotate_degrees=rotate_degrees, flip=flip, scale=scale_range)
        with stage("Prepare image", "preparation") as done:
            prepared = prepare_image(
                *to_pixels(image, mask),
                size=size,
                fit=fit,
                normalise=normalise,
                augmentation=augmentation,
                seed=seed,
            )
        return io.NodeOutput(to_image(prepared.pixels), to_mask(prepared.mask), ui=done.ui())


class DuetImageFeatures(io.ComfyNode):
    @classmethod
    @described_once(lambda: model_names("clip_vision"))
    def define_schema(cls):
        return io.Schema(
            node_id="DuetImageFeatures",
            display_name="Image features",
            category="Duet",
            description="Looks at a picture with an image encoder: what it shows, and how it is drawn.",
            inputs=[
                sockets.Model.Input("model", tooltip="The model whose image encoder looks at the picture."),
                io.Image.Input("image", tooltip="One picture or a batch, of any size; grey, RGB or RGBA."),
                io.Mask.Input("mask", optional=True, tooltip=MASK_TOOLTIP),
                io.Combo.Input(
                    "encoder",
                    options=[*ENCODERS, *model_names("clip_vision")],
                    default="model",
                    tooltip="model: the model's own encoder, which Fuse understands. efficientnet-lite0: a CNN that "
                    "knows ImageNet, where its package is installed. Any other: a file or folder of "
                    "models/clip_vision, of CLIP, SigLIP, DINOv2, or a CNN of timm.",
                ),
                io.Int.Input(
                    "layer",
                    default=-1,
                    min=-100,
                    max=100,
                    optional=True,
                    tooltip="Which layer to read: -1 is the last, -2 the one before, 0 the first. Early layers see "
                    "strokes and colours, late ones what is shown.",
                ),
                io.Combo.Input(
                    "region",
                    options=REGIONS,
                    default="white",
                    optional=True,
                    tooltip="What the mask does. white: the encoder sees white where it hides the picture. pool: it "
                    "sees everything, and only the features of what is left are counted.",
                ),
                io.Boolean.Input(
                    "style_statistics",
                    default=False,
                    optional=True,
                    tooltip="Also measure which features occur together, wherever they do: the style. For Refine.",
                ),
                io.Combo.Input(
                    "batch",
                    options=BATCHES,
                    default="keep",
                    optional=True,
                    tooltip="keep: each picture of a batch by itself. average: all of them as one reference.",
                ),
            ],
            outputs=[
                sockets.ImageFeatures.Output(
                    "image_features", display_name="image_features", tooltip="The features, for Fuse."
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, encoder: str | None = None, region: str | None = None, batch: str | None = None
    ) -> bool | str:
        for name, value, options in (
            ("encoder", encoder, [*ENCODERS, *model_names("clip_vision")]),
            ("region", region, REGIONS),
            ("batch", batch, BATCHES),
        ):
            if (said := check_choice("Image features", name, value, options)) is not True:
                return said
        return True

    @classmethod
    def fingerprint_inputs(cls, encoder: str | None = None, **others: object) -> str | float:
        return fingerprint("clip_vision", encoder)

    @classmethod
    def execute(
        cls,
        model,
        image,
        encoder: str,
        mask=None,
        layer: int = -1,
        region: str = "white",
        style_statistics: bool = False,
        batch: str = "keep",
    ):
        with stage("Image features", "features") as done:
            pixels, opacity = to_pixels(image, mask)
            features = recalled(
                embedding_store(),
                encode_image,
                model_cache(),
                model,
                pixels,
                opacity,
                _encoder(encoder),
                layer=layer,
                region=region,
                gram=style_statistics,
                batch=batch,
            )
        return io.NodeOutput(features, ui=done.ui(features.notices))


def _encoder(name: str) -> str | ImageEncoder:
    return name if name in ENCODERS else open_image_encoder(model_path("clip_vision", name), weights_digests())
