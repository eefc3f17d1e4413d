"""A language model of a million parameters that talks: text from rules, trained in minutes on one core."""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
