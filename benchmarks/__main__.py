"""``python -m benchmarks`` runs every measure of speed, ``python -m benchmarks NAME [options]`` one of any kind.

Without a name, each measure runs in a process of its own, one after the other, within twenty minutes in all; the first
time on a machine, what is measured on is fetched and drawn before that. It says on stderr what it does, prints a table
and, last, one JSON line: {name: {"ratio" or "milliseconds", "ours", "host", "diffusers", "unit", "aim", ...}}. --write
puts table and machine into docs/benchmarks.md. On a GPU the same command runs the larger sizes.
"""

import argparse
import contextlib
import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ._harness import Result, as_text, machine, run_apart, table, told, write_page

# In the order of the table. By themselves they take about the seconds given on two quiet cores.
SPEED = {
    "warm": 240,
    "overhead": 110,
    "variants": 30,
    "cold": 145,
    "unet_cache": 130,
    "step_cache": 150,
    "few_steps": 120,
    "save": 60,
    "decode": 5,
    "growth": 180,
}
WITHIN = 1200
# Before the time of the measures begins: what is made once on a machine, and then read.
PREPARED = {"few_steps": 2400}
# Of full size, which takes half a minute to write: once for all of them.
ON_ONE_MODEL = {"warm", "overhead", "cold"}


def main() -> None:
    found = [each.name for each in pkgutil.iter_modules([str(Path(__file__).parent)]) if not each.name.startswith("_")]
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        if sys.argv[1] not in found:
            sys.exit(f"expected the name of a measure, one of {', '.join(found)}; got {sys.argv[1]!r}")
        importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"measures: {', '.join(found)}",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=list(SPEED), default=list(SPEED), help="these measures alone")
    parser.add_argument("--within", type=float, default=WITHIN, help="seconds for all; what is left out is told")
    parser.add_argument("--write", action="store_true", help="put them into docs/benchmarks.md; others stay")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        results = measure([name for name in chosen.only if name in found], chosen.within, Path(base))
    print(as_text(table(results)))
    if chosen.write:
        write_page(results, machine())
    print(json.dumps(results), flush=True)
    if any("error" in one for one in results.values()):
        sys.exit(1)


def measure(names: list[str], within: float, base: Path) -> dict[str, Result]:
    """Each in turn. One that fails or hangs does not take the others along; its entry says what happened.

    base: the host's folder for those of ON_ONE_MODEL.
    """
    results: dict[str, Result] = {}
    for name in PREPARED.keys() & set(names):
        told(f"{name}: making what it needs, unless it is there")
        with contextlib.suppress(subprocess.TimeoutExpired, RuntimeError, ValueError):  # the measure itself says why
            run_apart(name, ["--prepare"], PREPARED[name])
    ends = time.monotonic() + within
    for place, name in enumerate(names):
        left = ends - time.monotonic()
        # What the others need is kept for them, as far as it goes; what they do not use is for those that come later.
        needed = sum(SPEED[other] for other in names[place + 1 :])
        seconds = max(left - needed, left * SPEED[name] / (SPEED[name] + needed))
        told(f"{name}: {place + 1} of {len(names)}, at most {seconds:.0f} s")
        started = time.monotonic()
        further = ["--base", str(base)] if name in ON_ONE_MODEL else []
        try:
            results[name] = run_apart(name, further, seconds) if seconds > 1 else {"error": "no time was left for it"}
        except subprocess.TimeoutExpired:
            results[name] = {"error": f"not done within {seconds:.0f} s"}
        except (RuntimeError, ValueError) as error:
            results[name] = {"error": " ".join(str(error).split())[:300]}
        told(f"{name}: {results[name].get('error', 'done')} ({time.monotonic() - started:.0f} s)")
    return results


main()
