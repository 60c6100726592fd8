"""What a workflow or a model folder lacks, which versions are installed, and what is in memory and why.

``python -m pipeline.doctor WORKFLOW.json --models COMFYUI/models`` or ``python -m pipeline.doctor MODEL_FOLDER``
"""

import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import open_checkpoint
from ..files.components import open_component
from ..files.safetensors_files import CheckpointError, read_json
from ..model_cache import CacheStats
from ..residency import megabytes
from .model_folders import Finding, find_files
from .workflow_files import WorkflowNode, read_workflow, wanted_files

# The lowest that pyproject.toml asks for, and what the tests ran with last; a test holds them to both.
VERSIONS: dict[str, tuple[str, str]] = {
    "torch": ("2.10", "2.14.1"),
    "transformers": ("4.57", "5.24.0"),
    "diffusers": ("0.42.1", "0.42.1"),
    "pillow": ("12.3", "13.0.0"),
    "numpy": ("1.26", "2.4.6"),
    "safetensors": ("0.4.5", "0.8.0"),
}
# The same of the host, whose version the block knows.
HOST: tuple[str, str] = ("0.3.75", "0.33.0")
# What only the page knows: it never reaches the host.
_PAGE_ONLY = {"Note", "MarkdownNote", "PrimitiveNode", "Reroute"}


@dataclass(frozen=True)
class Version:
    """verdict: "works": what was tested, or between it and the lowest; "newer": than what was tested; "too old";
    "missing"."""

    name: str
    installed: str | None
    lowest: str
    tested: str
    verdict: str

    def __str__(self) -> str:
        told = {
            "works": "known to work",
            "newer": f"newer than {self.tested}, which is known to work",
            "too old": f"too old: {self.lowest} or newer is needed",
            "missing": f"missing: {self.lowest} or newer is needed",
        }
        return f"{self.name} {self.installed or ''}: {told[self.verdict]}".replace(" :", ":")


@dataclass(frozen=True)
class Report:
    """files: what is asked for; nodes: types that are not installed; versions; memory: a sentence for each model."""

    files: tuple[Finding, ...] = ()
    nodes: tuple[str, ...] = ()
    versions: tuple[Version, ...] = ()
    memory: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        installed = all(version.verdict in ("works", "newer") for version in self.versions)
        return installed and not self.nodes and all(finding.status == "found" for finding in self.files)

    def as_json(self) -> dict[str, Any]:
        """Plain values only."""
        return {"healthy": self.healthy} | json.loads(json.dumps(asdict(self)))

    def as_text(self) -> str:
        wrong = [finding for finding in self.files if finding.status != "found"]
        lines = ["All is well." if self.healthy else "Something is missing or broken."]
        lines += ["", f"Files: {len(self.files) - len(wrong)} of {len(self.files)} in order"]
        lines += [str(finding) for finding in (*wrong, *(each for each in self.files if each.status == "found"))]
        if self.nodes:
            lines += ["", "Nodes that are not installed:", *self.nodes]
        lines += ["", "Versions:", *map(str, self.versions)]
        if self.memory:
            lines += ["", "Memory:", *self.memory]
        return "\n".join(lines)


def examine_workflow(
    text: str | bytes, folders: Mapping[str, Sequence[Path]], known_types: Collection[str] | None = None
) -> Report:
    """A workflow in the page's or the API's format. folders: the host's by kind, as ``host_folders`` gives them.

    known_types: the nodes that are installed; None asks nothing about them. Raises ValueError for what is no workflow.
    """
    nodes = read_workflow(text)
    unknown = sorted({node.type for node in nodes if not _is_known(node, known_types)})
    return Report(tuple(find_files(wanted_files(nodes), folders)), tuple(unknown), examine_versions())


def examine_folder(folder: Path) -> Report:
    """A diffusers folder: a finding for each component that its model_index.json names. Its state raises nothing."""
    index_path = folder / "model_index.json"
    try:
        index = read_json(index_path)
    except CheckpointError as error:
        return Report((Finding(folder.name, "", "model_index.json", "missing", (str(index_path),), str(error)),))
    findings = []
    for name, entry in index.items():
        if not isinstance(entry, list) or entry == [None, None]:
            continue
        place = (str(index_path.parent / name),)
        try:
            open_component(index_path, name, entry)
        except CheckpointError as error:
            status = "missing" if not (index_path.parent / name).is_dir() else "broken"
            findings.append(Finding(folder.name, "", str(name)[:80], status, place, str(error)))
        else:
            findings.append(Finding(folder.name, "", name, "found", place))
    if all(finding.status == "found" for finding in findings):
        try:
            open_checkpoint(folder)  # what is asked of the whole, such as a component that the index does not name
        except CheckpointError as error:
            findings.append(Finding(folder.name, "", "model_index.json", "broken", (str(index_path),), str(error)))
    return Report(tuple(findings), versions=examine_versions())


def examine_versions(host: str | None = None) -> tuple[Version, ...]:
    """host: the version of the ComfyUI that asks."""
    found = [] if host is None else [_judged("ComfyUI", host, *HOST)]
    for name, (lowest, tested) in VERSIONS.items():
        try:
            found.append(_judged(name, importlib.metadata.version(name), lowest, tested))
        except importlib.metadata.PackageNotFoundError:
            found.append(Version(name, None, lowest, tested, "missing"))
    return tuple(found)


def _judged(name: str, installed: str, lowest: str, tested: str) -> Version:
    numbers = _numbers(installed)
    verdict = "too old" if numbers < _numbers(lowest) else "newer" if numbers > _numbers(tested) else "works"
    return Version(name, installed, lowest, tested, verdict)


def examine_memory(stats: CacheStats) -> tuple[str, ...]:
    """One sentence for each model that the cache holds, and for each that it let go lately: where it is, and why."""
    held, budget = megabytes(stats.bytes_held), megabytes(stats.budget_bytes)
    lines = [f"{held} of {budget} are filled by {len(stats.entries)} models"]
    for entry in reversed(stats.entries):
        where = "on the device" if entry.on_device else "in memory, off the device"
        why = f"kept, since there is room: used {entry.hits + 1} times, last {entry.idle} uses of any model ago"
        if entry.pins:
            why = f"in use {entry.pins} times at this moment"
        lines.append(f"{entry.key}: {megabytes(entry.bytes)}, {where}; {why}")
    for gone in reversed(stats.recent_evictions):
        lines.append(f"{gone.key}: {megabytes(gone.bytes)}, let go: {gone.reason}")
    return tuple(lines)


def _is_known(node: WorkflowNode, known_types: Collection[str] | None) -> bool:
    is_subgraph = node.type.count("-") == 4 and len(node.type) == 36  # the page names a subgraph by a UUID
    return known_types is None or node.type in known_types or node.type in _PAGE_ONLY or is_subgraph


def _numbers(version: str) -> tuple[int, ...]:
    """Of a release: "2.14.1+cpu" -> (2, 14, 1), "5.0.0rc1" -> (5, 0, 0)."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)
