"""What all measures share: turns taken one after the other, medians, clocks, fits, the machine and the table."""

import contextlib
import functools
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"

Result = dict[str, Any]
Turn = Callable[[], float]


def told(text: str) -> None:
    """Progress, on stderr: stdout holds nothing but results."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def interleaved(turns: Mapping[str, Turn], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """What each turn gave, in A B C, A B C, ... order, so that a machine that slows down slows down all of them.

    A turn measures itself and gives a number. The first ``warm_up`` rounds do not count. Every other round goes
    backwards, since what comes first in a round finds other caches than what comes last.
    """
    found: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(warm_up + repeats):
        names = list(turns) if number % 2 == 0 else list(turns)[::-1]
        for name in names:
            gc.collect()
            value = turns[name]()
            if number >= warm_up:
                found[name].append(value)
        last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in found.items() if values)
        told(f"  round {number + 1} of {warm_up + repeats}{': ' + last if last else ' (warming up)'}")
    return found


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in found.items()}


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' own ratios: on a shared machine, what slows a round slows both sides of it."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def result(*, unit: str, aim: str, ours: float | None, met: bool | None, **others: Any) -> Result:
    """One measure. ``ratio`` or ``milliseconds`` comes first, whichever the aim is about; None is not measured."""
    first = [name for name in ("ratio", "milliseconds") if name in others]
    head = {name: others.pop(name) for name in first}
    sides = {"ours": ours, "host": others.pop("host", None), "diffusers": others.pop("diffusers", None)}
    return rounded(head | sides | {"unit": unit, "aim": aim, "met": met} | others)


def not_run(reason: str, aim: str, unit: str) -> Result:
    return result(ratio=None, ours=None, unit=unit, aim=aim, met=None, not_run=reason)


def rounded(value: Any, digits: int = 5) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: rounded(each, digits) for name, each in value.items()}
    return [rounded(each, digits) for each in value] if isinstance(value, list | tuple) else value


def fitted_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """p of cost ~ size^p, by least squares of the logarithms."""
    slope, _ = statistics.linear_regression([math.log(each) for each in sizes], [math.log(each) for each in costs])
    return slope


def wall(work: Callable[[], Any]) -> float:
    """Seconds by the clock, the device's work included."""
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch:
    """Time inside chosen calls, however they nest: only the outermost counts."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._deep = 0
        self._hidden = 0

    @contextlib.contextmanager
    def around(self, *places: tuple[Any, str]) -> Iterator["Stopwatch"]:
        """Count the time in each ``owner.name`` while in the block."""
        with _replaced(places, self._timed):
            yield self

    @contextlib.contextmanager
    def not_in(self, *places: tuple[Any, str]) -> Iterator["Stopwatch"]:
        """Count nothing that happens within each ``owner.name``."""
        with _replaced(places, self._hiding):
            yield self

    def reset(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._deep or self._hidden:
                return call(*arguments, **options)
            self._deep += 1
            synchronise()
            started = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                synchronise()
                self.seconds += time.perf_counter() - started
                self.calls += 1
                self._deep -= 1

        return timed

    def _hiding(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def hidden(*arguments: Any, **options: Any) -> Any:
            self._hidden += 1
            try:
                return call(*arguments, **options)
            finally:
                self._hidden -= 1

        return hidden


@contextlib.contextmanager
def _replaced(places: Sequence[tuple[Any, str]], change: Callable[..., Any]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        for owner, name, call in before:
            setattr(owner, name, change(call))
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> dict[str, Any]:
    """Cores, memory and device, and the versions that decide speed. No names of hosts."""
    import torch

    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    names = ("torch", "diffusers", "transformers", "numpy", "pillow", "safetensors")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "memory GB": round(pages / 2**30),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "ComfyUI": _host_version(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _host_version() -> str:
    from tests.rig.host import host_tree

    text = (host_tree() / "comfyui_version.py").read_text(encoding="utf-8")
    return text.partition('__version__ = "')[2].partition('"')[0]


def last_json(text: str) -> Result:
    """The object on the last line that is one. Raises ValueError where none is."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(line)
    raise ValueError(f"expected a JSON object on the last line, got {text[-200:]!r}")


def run_apart(name: str, arguments: Sequence[str], seconds: float) -> Result:
    """One measure in a process of its own, so that none sees what another left, or its failure.

    Raises subprocess.TimeoutExpired, or RuntimeError with what it said last.
    """
    command = [sys.executable, "-m", "benchmarks", name, *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=seconds, cwd=ROOT, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stdout[-300:]}")
    return last_json(done.stdout)


COLUMNS = ("measure", "ours", "stock host", "diffusers", "unit", "ratio", "aim", "met")


def table(results: Mapping[str, Result]) -> list[tuple[str, ...]]:
    """Rows of text, the first of them COLUMNS."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for name, found in results.items():
        unit = found.get("unit", "")
        if "error" in found or "not_run" in found:
            why = found.get("error") or found.get("not_run")
            rows.append((name, f"not run: {why}", "-", "-", unit, "-", str(found.get("aim", "-")), "-"))
            continue
        figure = found.get("ratio", found.get("milliseconds"))
        met = {True: "yes", False: "no", None: "-"}[found.get("met")]
        cells = (found.get("ours"), found.get("host"), found.get("diffusers"))
        rows.append((name, *map(_cell, cells), unit, _cell(figure), str(found.get("aim", "-")), met))
    return rows


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float | int) and not isinstance(value, bool) else str(value)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *others = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *others])


def write_page(results: Mapping[str, Result], about: Mapping[str, Any], page: Path = PAGE) -> None:
    """Replace the results on the page, between its two marks, and leave all other words as they are.

    All results are kept beside the page, as JSON, each with its machine. A measure that was not run, or failed, keeps
    what it had there, and the page says so.
    """
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"expected {BEGIN} and {END} in {page}, found not both")
    kept = page.with_suffix(".json")
    earlier: dict[str, Result] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    on = ", ".join(f"{name} {value}" for name, value in about.items())
    had = {name for name, one in earlier.items() if "error" not in one}
    new = {name: one for name, one in results.items() if "error" not in one or name not in had}
    fresh = {name: one | {"measured_on": on} for name, one in new.items()}
    old = [_why_kept(name, one, results.get(name), on) for name, one in earlier.items() if name not in fresh]
    results = earlier | fresh
    lines = [f"Measured on: {on}.", as_markdown(table(results))]
    if old:
        lines.append(f"Not of the last run, but kept from earlier ones: {', '.join(old)}.")
    lines.append(f"All rounds and further figures: [{kept.name}]({kept.name}).")
    body = "\n\n".join([BEGIN, *lines, END])
    text = before + body + after
    for target, content in ((page, text), (kept, json.dumps(results, indent=1) + "\n")):
        beside = target.with_suffix(".part")
        beside.write_text(content, encoding="utf-8")
        beside.replace(target)


def _why_kept(name: str, one: Result, now: Result | None, on: str) -> str:
    """A row's name, with how the last run of it failed and its own machine, where that is another."""
    notes = [f"failed this time: {now['error']}"] if now else []
    if one.get("measured_on", on) != on:
        notes.append(f"measured on: {one['measured_on']}")
    return f"`{name}`" + (f" ({'; '.join(notes)})" if notes else "")
