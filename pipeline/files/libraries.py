"""Which versions of its libraries a result came from."""

import os
import sys
from importlib.util import find_spec


def library_marks(*names: str) -> list[tuple[str, int, int]]:
    """(name, bytes, time) of the file that each begins with, which an update writes anew; zeros where there is none.

    To ask the installer's records for a version takes a hundred times as long, and to import a library longer still.
    """
    return [(name, *_mark(name)) for name in names]


def _mark(name: str) -> tuple[int, int]:
    loaded = getattr(sys.modules.get(name), "__file__", None)
    # A tenth of the time that the import system takes, which is asked for all else.
    for path in [loaded] if loaded else [f"{folder or '.'}/{name}/__init__.py" for folder in sys.path]:
        try:
            status = os.stat(path)
        except OSError:
            continue
        return status.st_size, status.st_mtime_ns
    spec = find_spec(name)
    status = os.stat(spec.origin) if spec and spec.origin else None
    return (status.st_size, status.st_mtime_ns) if status else (0, 0)
