"""A saved workflow, in the page's format or the API's -> which model files its nodes name, and of which folder."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..files.safetensors_files import shown

LARGEST_WORKFLOW = 16 * 2**20  # bytes; the page itself is slow long before
MOST_NODES = 20_000
MODEL_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl", ".gguf", ".onnx")
ANY_FOLDER = ""

# Of the host's own nodes: the place among a node's widgets, the input's name, and the folder below models.
_CHECKPOINT = ((0, "ckpt_name", "checkpoints"),)
_LORA = ((0, "lora_name", "loras"),)
_ENCODERS = tuple((place, f"clip_name{place + 1}", "text_encoders") for place in range(4))
_KNOWN: dict[str, tuple[tuple[int, str, str], ...]] = {
    "AudioEncoderLoader": ((0, "audio_encoder_name", "audio_encoders"),),
    "CLIPLoader": ((0, "clip_name", "text_encoders"),),
    "CLIPVisionLoader": ((0, "clip_name", "clip_vision"),),
    "CheckpointLoader": ((0, "config_name", "configs"), (1, "ckpt_name", "checkpoints")),
    "CheckpointLoaderSimple": _CHECKPOINT,
    "ControlNetLoader": ((0, "control_net_name", "controlnet"),),
    "CreateHookLora": _LORA,
    "CreateHookLoraModelOnly": _LORA,
    "CreateHookModelAsLora": _CHECKPOINT,
    "CreateHookModelAsLoraModelOnly": _CHECKPOINT,
    "DiffControlNetLoader": ((0, "control_net_name", "controlnet"),),
    "DiffusersLoader": ((0, "model_path", "diffusers"),),
    "DualCLIPLoader": _ENCODERS[:2],
    "GLIGENLoader": ((0, "gligen_name", "gligen"),),
    "HypernetworkLoader": ((0, "hypernetwork_name", "hypernetworks"),),
    "ImageOnlyCheckpointLoader": _CHECKPOINT,
    "LatentUpscaleModelLoader": ((0, "model_name", "latent_upscale_models"),),
    "LoadImage": ((0, "image", "input"),),
    "LoadImageMask": ((0, "image", "input"),),
    "LoraLoader": _LORA,
    "LoraLoaderModelOnly": _LORA,
    "ModelPatchLoader": ((0, "name", "model_patches"),),
    "PhotoMakerLoader": ((0, "photomaker_model_name", "photomaker"),),
    "QuadrupleCLIPLoader": _ENCODERS,
    "StyleModelLoader": ((0, "style_model_name", "style_models"),),
    "TripleCLIPLoader": _ENCODERS[:3],
    "UNETLoader": ((0, "unet_name", "diffusion_models"),),
    "UpscaleModelLoader": ((0, "model_name", "upscale_models"),),
    "VAELoader": ((0, "vae_name", "vae"),),
    "unCLIPCheckpointLoader": _CHECKPOINT,
    "DuetDirectPrompt": ((0, "language_model", "LLM"),),
    "DuetFuse": ((2, "projection", "style_models"),),
    "DuetIPAdapter": ((0, "ip_adapter", "ipadapter"), (1, "image_encoder", "clip_vision")),
    "DuetImageFeatures": ((0, "encoder", "clip_vision"),),
    "DuetLoadEmbeddings": ((0, "file", "input"),),
    "DuetLoadLora": ((0, "lora", "loras"),),
    "DuetLoadModel": (
        *((0, "model", "diffusers"), (1, "text_encoder", "text_encoders"), (2, "text_encoder_2", "text_encoders")),
        *((3, "text_encoder_3", "text_encoders"), (4, "vae", "vae")),
    ),
    "DuetSpeedPlan": ((9, "decoder", "vae_approx"), (10, "preview", "vae_approx")),
    "DuetTextEncoder": ((0, "text_encoder", "text_encoders"),),
}
# Of every other node, since packs name their inputs as the host does.
_BY_INPUT = {name: folder for inputs in _KNOWN.values() for _, name, folder in inputs if name.endswith("_name")} | {
    "clip_name": "text_encoders",
    "clip_vision_name": "clip_vision",
    "ipadapter_file": "ipadapter",
    "lora": "loras",
    "model_name": ANY_FOLDER,
}
# Choices that name no file: VAELoader builds these from models/vae_approx or from nothing.
_NO_FILE = {"taesd", "taesdxl", "taesd3", "taef1", "pixel_space", "none", "[none]", "default", "auto", "baked vae"}
# Those of Duet's own blocks.
_NO_FILE |= {
    "duet-mini (built in)",
    "automatic",
    "model",
    "efficientnet-lite0",
    "none (the brief as it is)",
    "the model's own",
}
# Blocks whose choices begin with the folder that they lie in, where that is one of these.
_IN_FOLDER = {
    "DuetLoadModel": ("checkpoints/", "diffusion_models/"),
    "DuetDirectPrompt": ("LLM/", "text_encoders/"),
    "DuetSpeedPlan": ("vae_approx/", "vae/"),
}


@dataclass(frozen=True)
class WorkflowNode:
    """values: what its widgets hold, by the input's name, or by "#" and a place where the file gives no name.

    models: (name, folder) of what the workflow's author declared; title: as the author has it, or the type.
    """

    id: str
    type: str
    title: str
    values: Mapping[str, Any]
    models: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.title} (node {self.id})"


@dataclass(frozen=True)
class WantedFile:
    """One file that a node names. folder: below models, such as "loras"; "" where the node does not tell.

    language_model: a GGUF file, or a folder as transformers saves it.
    """

    node: str
    folder: str
    name: str
    language_model: bool = False


def read_workflow(text: str | bytes) -> list[WorkflowNode]:
    """Every node, those in subgraphs too. Raises ValueError, in bounded time, for what is no workflow."""
    if len(text) > LARGEST_WORKFLOW:
        raise ValueError(f"expected a workflow of at most {LARGEST_WORKFLOW:,} bytes, got {len(text):,}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"expected a workflow as JSON, got {shown(text[:40])} ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a workflow as a JSON object, got {shown(found)}")
    for wrapper in ("workflow", "prompt"):  # as some tools save it, with other things beside
        if isinstance(found.get(wrapper), dict) and "class_type" not in found[wrapper]:
            found = found[wrapper]
    if isinstance(found.get("nodes"), list):
        nodes = list(_page_nodes(found))
    else:
        nodes = [_api_node(number, node) for number, node in found.items() if _is_api_node(node)]
    if not nodes and found.get("nodes") != []:
        raise ValueError(
            f"expected nodes in the page's or the API's format, got an object of {shown(sorted(found)[:9])}"
        )
    if len(nodes) > MOST_NODES:
        raise ValueError(f"expected at most {MOST_NODES:,} nodes, got more")
    return nodes


def wanted_files(nodes: list[WorkflowNode]) -> list[WantedFile]:
    """Which files the nodes name, each once for each node."""
    found: dict[WantedFile, None] = {}
    for node in nodes:
        known = _KNOWN.get(node.type, ())
        folders = _BY_INPUT | {name: folder for _, name, folder in known}
        folders |= {f"#{place}": folder for place, _, folder in known}
        declared = dict(node.models)
        for key, value in node.values.items():
            name = value.strip() if isinstance(value, str) else ""
            names_file = key in folders or name.lower().endswith(MODEL_SUFFIXES)
            if not name or "\n" in name or name.lower() in _NO_FILE or not names_file:
                continue
            folder = folders.get(key, ANY_FOLDER) or declared.get(name, ANY_FOLDER)
            if folder == ANY_FOLDER and not name.lower().endswith(MODEL_SUFFIXES):
                continue
            writes = node.type == "DuetDirectPrompt"
            is_file = node.type != "DuetLoadModel" or name.endswith(".safetensors")  # or a folder of that very name
            if name.startswith(_IN_FOLDER.get(node.type, ())) and is_file:
                folder, _, name = name.partition("/")
            found[WantedFile(str(node), folder, name, writes)] = None
        named = {wanted.name for wanted in found}
        for name, folder in node.models:
            if name not in named:
                found[WantedFile(str(node), folder, name)] = None
    return list(found)


def _is_api_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str)


def _api_node(number: str, node: dict[str, Any]) -> WorkflowNode:
    inputs, meta = node.get("inputs"), node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    values = {key: value for key, value in inputs.items() if isinstance(value, str)} if isinstance(inputs, dict) else {}
    return WorkflowNode(str(number), node["class_type"], _title(title, node["class_type"]), values)


def _page_nodes(workflow: dict[str, Any]) -> Iterator[WorkflowNode]:
    """Those of the graph and of each subgraph; at most one more than is allowed."""
    definitions = workflow.get("definitions")
    subgraphs = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    count = 0
    for graph in [workflow, *(subgraphs if isinstance(subgraphs, list) else [])]:
        nodes = graph.get("nodes") if isinstance(graph, dict) else None
        for node in nodes if isinstance(nodes, list) else []:
            if isinstance(node, dict) and isinstance(node.get("type"), str):
                count += 1
                if count > MOST_NODES + 1:
                    return
                yield _page_node(node)


def _page_node(node: dict[str, Any]) -> WorkflowNode:
    properties = node.get("properties")
    declared = properties.get("models") if isinstance(properties, dict) else None
    models = tuple(
        (model["name"], model["directory"])
        for model in (declared if isinstance(declared, list) else [])
        if isinstance(model, dict) and isinstance(model.get("name"), str) and isinstance(model.get("directory"), str)
    )
    title = _title(node.get("title"), node["type"])
    return WorkflowNode(str(node.get("id")), node["type"], title, _widget_values(node), models)


def _widget_values(node: dict[str, Any]) -> dict[str, Any]:
    """By name where the file gives them; a newer page lists its widgets among the inputs, in their order."""
    values, inputs = node.get("widgets_values"), node.get("inputs")
    if isinstance(values, dict):
        return {str(key): value for key, value in values.items() if isinstance(value, str)}
    if not isinstance(values, list):
        return {}
    widgets = [
        entry["widget"].get("name")
        for entry in (inputs if isinstance(inputs, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("widget"), dict)
    ]
    # Only where all are listed do the places agree; a seed brings one more widget, which no input stands for.
    named = len(widgets) == len(values) and node["type"] not in _KNOWN
    keys = widgets if named else [f"#{place}" for place in range(len(values))]
    return {str(key): value for key, value in zip(keys, values, strict=True) if isinstance(value, str)}


def _title(title: object, type_name: str) -> str:
    return title[:80] if isinstance(title, str) and title.strip() else type_name[:80]
