"""Which versions of its libraries a result came from."""

from importlib.util import find_spec
from pathlib import Path


def library_marks(*names: str) -> list[tuple[str, int, int]]:
    """(name, bytes, time) of the file that each begins with, which an update writes anew; zeros where there is none.

    To ask the installer's records for a version takes a hundred times as long, and to import a library longer still.
    """
    marks = []
    for name in names:
        spec = find_spec(name)
        status = Path(spec.origin).stat() if spec and spec.origin else None
        marks.append((name, status.st_size, status.st_mtime_ns) if status else (name, 0, 0))
    return marks
