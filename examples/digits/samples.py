"""The held-out digits, as samples to calibrate on and to judge by: 450 images with their labels."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np


def samples() -> Iterator[dict[str, np.ndarray]]:
    """Image and label, one at a time."""
    with np.load(Path(__file__).parent / "heldout.npz") as held:
        images, labels = held["images"].astype(np.float32), held["labels"]
    yield from ({"image": images[i : i + 1], "label": labels[i : i + 1]} for i in range(len(images)))
