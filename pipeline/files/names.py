"""Names that come out of a shared workflow, and may not lead anywhere else."""

from pathlib import PurePosixPath, PureWindowsPath

_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
_LONGEST_NAME = 200


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is a relative path that stays below its folder, on every system."""
    parts = PureWindowsPath(name).parts  # splits at both kinds of slash
    if not parts or len(name) > _LONGEST_NAME or any(ord(character) < 32 for character in name):
        raise ValueError(f"model name {name[:_LONGEST_NAME]!r}: expected the name of a folder in models/diffusers")
    if PureWindowsPath(name).anchor or PurePosixPath(name).is_absolute() or ".." in parts:
        raise ValueError(f"model name {name!r} leads out of models/diffusers: expected the name of a folder inside")
    for part in parts:
        if part.split(".")[0].strip().lower() in _DEVICE_NAMES or part != part.rstrip(". ") or ":" in part:
            raise ValueError(f"model name {name!r}: {part!r} cannot name a folder on every system")
