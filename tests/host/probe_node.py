"""A custom node mounted beside the pack in test hosts: what lives in the host's process, counted without the pack."""

# pyright: reportMissingImports=false
# The host is no package that a checker could find: it is the program that loads us.

import gc

import comfy.model_management
import torch


class DuetProbe:
    RETURN_TYPES = ()
    FUNCTION = "count"
    OUTPUT_NODE = True
    CATEGORY = "Duet tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {"after": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True  # "*" is no type that the host knows: it would compare it with the link's

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def count(self, after=None):
        holders = [thing for thing in gc.get_objects() if type(thing).__name__ == "DuetModel"]
        loaded = [entry for entry in comfy.model_management.current_loaded_models if entry.model is not None]
        ours = [entry for entry in loaded if type(entry.model.model).__name__ == "DuetModel"]
        tensors = [tensor for holder in holders for tensor in (*holder.parameters(), *holder.buffers())]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        report = {
            "alive": len(holders),
            "bytes_alive": sum(storages.values()),
            "host_counts": sum(entry.model_loaded_memory() for entry in ours),
            "cuda_bytes": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
        }
        return {"ui": {"duet_probe": [report]}}


NODE_CLASS_MAPPINGS = {"DuetProbe": DuetProbe}
