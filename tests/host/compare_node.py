"""A custom node mounted beside the pack in test hosts: how far two values lie apart, before any rounding to 8 bits."""

import torch


class DuetCompare:
    RETURN_TYPES = ()
    FUNCTION = "compare"
    OUTPUT_NODE = True
    CATEGORY = "Duet tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"one": ("*",), "other": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True  # "*" is no type that the host knows: it would compare it with the link's

    def compare(self, one, other):
        one, other = self._tensor(one), self._tensor(other)
        report = {
            "shapes": [list(one.shape), list(other.shape)],
            "apart": float((one - other).abs().max()) if one.shape == other.shape else -1.0,
            "apart_on_average": float((one - other).abs().mean()) if one.shape == other.shape else -1.0,
            "deviation": float(one.std()),
            "finite": bool(torch.isfinite(one).all() and torch.isfinite(other).all()),
        }
        return {"ui": {"duet_compare": [report]}}

    @staticmethod
    def _tensor(value):
        """Of an IMAGE, a LATENT, a CONDITIONING, a CLIP_VISION_OUTPUT, or embeddings of ours."""
        if hasattr(value, "image_embeds"):
            value = value.image_embeds
        if isinstance(value, dict):
            value = value["samples"]
        if isinstance(value, list):
            value = value[0][0]
        return getattr(value, "tokens", value).double().cpu()


NODE_CLASS_MAPPINGS = {"DuetCompare": DuetCompare}
