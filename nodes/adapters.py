"""What is laid over a model: LoRAs, and IP-Adapters that let it hear a picture."""

from ..nodes import sockets
from ..pipeline.adapters.ip_adapter import open_ip_adapter, show_picture
from ..pipeline.adapters.lora import open_lora
from ..pipeline.vision.image_encoders import open_image_encoder
from .choices import check_choice
from .described import described_once
from .host import io, model_cache, weights_digests
from .images import to_pixels
from .model_files import fingerprint, model_names, model_path
from .stages import stage
from .vision import MASK_TOOLTIP

NONE, OWN = "none", "model"


class DuetLoadLora(io.ComfyNode):
    @classmethod
    @described_once(lambda: _loras())
    def define_schema(cls):
        return io.Schema(
            node_id="DuetLoadLora",
            display_name="Load LoRA",
            category="Duet",
            description="Lays a LoRA over a model: a style, a subject, or few-step drawing. Several can be chained.",
            inputs=[
                sockets.Model.Input("model", tooltip="The model that it is laid over. It stays as it is for others."),
                io.Combo.Input(
                    "lora",
                    options=_loras(),
                    default=NONE,
                    tooltip="A file in models/loras, made for the model's family. none: the model as it is.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    tooltip="1 as it was trained, 0 without it. Below 0 it is taken away.",
                ),
            ],
            outputs=[
                sockets.Model.Output(
                    "adapted_model",
                    display_name="model",
                    tooltip="The model with it. For Generate, and for Embed text where it changes how words are read.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora: str | None = None) -> bool | str:
        return check_choice("Load LoRA", "lora", lora, _loras())

    @classmethod
    def fingerprint_inputs(cls, lora: str | None = None, **others: object) -> str | float:
        return fingerprint("loras", lora)

    @classmethod
    def execute(cls, model, lora: str, strength: float):
        with stage("Load LoRA", "adapter") as done:
            found = None if lora == NONE else open_lora(model, model_path("loras", lora), strength)
        if found is None:
            return io.NodeOutput(model, ui=done.ui())
        return io.NodeOutput(model.with_adapter(found), ui=done.ui(found.notices))


class DuetIPAdapter(io.ComfyNode):
    @classmethod
    @described_once(lambda: _ip_adapters(), lambda: _encoders())
    def define_schema(cls):
        return io.Schema(
            node_id="DuetIPAdapter",
            display_name="IP-Adapter",
            category="Duet",
            description="Lets a model hear a picture beside the words, by trained attention of its own.",
            inputs=[
                sockets.Model.Input("model", tooltip="A Stable Diffusion, SDXL, Kolors or FLUX.1 model."),
                io.Image.Input("image", tooltip="What is heard: one picture, or several that are heard together."),
                io.Mask.Input("mask", optional=True, tooltip=MASK_TOOLTIP),
                io.Combo.Input(
                    "ip_adapter",
                    options=_ip_adapters(),
                    default=NONE,
                    tooltip="A file in models/ipadapter, made for the model's family. none: the model as it is.",
                ),
                io.Combo.Input(
                    "image_encoder",
                    options=_encoders(),
                    default=OWN,
                    tooltip="The image encoder that the IP-Adapter was trained with, in models/clip_vision. model: the "
                    "one in the model's own folder.",
                ),
                io.Float.Input(
                    "scale",
                    default=0.6,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How loud the picture is: 0 is the words alone, 1 as it was trained.",
                ),
            ],
            outputs=[
                sockets.Model.Output(
                    "adapted_model", display_name="model", tooltip="The model that hears the picture. For Generate."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, ip_adapter: str | None = None, image_encoder: str | None = None) -> bool | str:
        said = check_choice("IP-Adapter", "IP-Adapter", ip_adapter, _ip_adapters())
        return check_choice("IP-Adapter", "image encoder", image_encoder, _encoders()) if said is True else said

    @classmethod
    def fingerprint_inputs(
        cls, ip_adapter: str | None = None, image_encoder: str | None = None, **others: object
    ) -> str | float:
        prints = fingerprint("ipadapter", ip_adapter), fingerprint("clip_vision", image_encoder)
        return float("nan") if any(isinstance(each, float) for each in prints) else repr(prints)

    @classmethod
    def execute(cls, model, image, ip_adapter: str, image_encoder: str, scale: float, mask=None):
        with stage("IP-Adapter", "adapter") as done:
            heard = model
            if ip_adapter != NONE:
                file = open_ip_adapter(model, model_path("ipadapter", ip_adapter))
                encoder = None
                if image_encoder != OWN:
                    encoder = open_image_encoder(model_path("clip_vision", image_encoder), weights_digests())
                heard = show_picture(model_cache(), model, file, encoder, *to_pixels(image, mask), scale=scale)
        return io.NodeOutput(heard, ui=done.ui())


def _loras() -> list[str]:
    return [NONE, *model_names("loras")]


def _ip_adapters() -> list[str]:
    return [NONE, *model_names("ipadapter")]


def _encoders() -> list[str]:
    return [OWN, *model_names("clip_vision")]
