"""``python -m benchmarks NAME [options]`` runs one measure; without a name it lists them."""

import importlib
import pkgutil
import sys
from pathlib import Path


def main() -> None:
    names = [
        found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)]) if not found.name.startswith("_")
    ]
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m benchmarks NAME [options], where NAME is one of: {', '.join(names)}")
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])


main()
