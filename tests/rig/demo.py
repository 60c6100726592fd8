"""The main job, told as it goes: a prompt and a style picture through the real host to a picture on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..rig import CACHE, OUTPUT, ROOT, RigError
from .client import Client, Prompt, Run
from .host import ComfyServer

_HERE = Path(__file__).parent
_STAGES = ("text", "preparation", "features", "fusion", "generation", "decode", "finish", "save")


def demo() -> None:
    """Run demo.json twice, the second time with another seed, and print what each stage took."""
    prompt: Prompt = json.loads((_HERE / "demo.json").read_text(encoding="utf-8"))
    print("host: starting ComfyUI", flush=True)
    with ComfyServer(CACHE / "demo", output=OUTPUT) as server:
        print(f"host: ready at {server.url}", flush=True)
        for picture in _HERE.glob("*.png"):
            shutil.copy(picture, server.input)
        client = Client(server.url)
        first = _run(client, prompt, "first run")
        for node in prompt.values():
            if "seed" in node["inputs"]:
                node["inputs"]["seed"] += 1
        second = _run(client, prompt, "again with another seed")
    _print_stages(prompt, first, second)
    images = [image for run in (first, second) for image in run.images()]
    for path in dict.fromkeys(OUTPUT / image["subfolder"] / image["filename"] for image in images):
        print(path.relative_to(ROOT))


def _run(client: Client, prompt: Prompt, what: str) -> Run:
    print(f"queue: {what}", flush=True)

    def tell(kind: str, data: dict[str, Any]) -> None:
        if kind == "executing" and data.get("node"):
            print(f"  {_title(prompt, data['node'])}", flush=True)
        elif kind == "progress":
            print(f"    step {data['value']} of {data['max']}", flush=True)

    run = client.run(prompt, tell)
    if not run.succeeded:
        error = run.error
        raise RigError(f"{error.get('node_type', 'the workflow')}: {error.get('exception_message', run.ended).strip()}")
    return run


def _title(prompt: Prompt, node: str) -> str:
    return prompt[node].get("_meta", {}).get("title") or prompt[node]["class_type"]


def _print_stages(prompt: Prompt, first: Run, second: Run) -> None:
    cold, warm = _stages(prompt, first), _stages(prompt, second)
    # The host says nothing more of a node that it need not run again: its stages are known from the first time.
    for node, stage in first.stages():
        if node in second.cached:
            warm[stage["stage"]] = "cached by the host"
    print(f"{'stage':<12}{'first run':<32}another seed")
    for stage in (stage for stage in _STAGES if stage in cold or stage in warm):
        print(f"{stage:<12}{cold.get(stage, '-'):<32}{warm.get(stage, '-')}".rstrip())


def _stages(prompt: Prompt, run: Run) -> dict[str, str]:
    """Stage name -> its milliseconds, and whether its model came from Duet's cache."""
    told = {}
    for _, stage in run.stages():
        model = {"loaded": "model loaded", "warm": "model in cache", "none": ""}[stage["model"]]
        told[stage["stage"]] = f"{stage['milliseconds']:8.1f} ms  {model}"
    for node in (node for node in run.outputs if prompt[node]["class_type"] == "SaveImage"):
        told["save"] = f"{run.milliseconds[node]:8.1f} ms"
    return told
