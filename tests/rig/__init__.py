"""The rig: a real ComfyUI with the pack mounted, set up from nothing. Importing it needs the standard library only."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CACHE = ROOT / ".cache"
OUTPUT = ROOT / "output"


class RigError(Exception):
    """Something the user can put right; the message says what. Shown without a traceback."""
