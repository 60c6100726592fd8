"""The small model that ships with the pack: its folder of weights, and the code that trained it."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "duet-mini"
