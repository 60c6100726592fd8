"""The rig: a real ComfyUI with the pack mounted, set up from nothing. Importing it needs the standard library only."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CACHE = ROOT / ".cache"
OUTPUT = ROOT / "output"

# For processes that compute: OpenMP threads that wait by spinning make small models up to 70 times slower on a CPU that
# has other work too, since each spins away the time that the other would need.
CALM_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}


class RigError(Exception):
    """Something the user can put right; the message says what. Shown without a traceback."""
