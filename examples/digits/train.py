"""Trains a small residual CNN on scikit-learn's digits and writes digits.onnx and heldout.npz beside this file.

    python -m examples.digits.train          needs the extra train; fifteen seconds

The committed files come from here. The graph is written out layer by layer, batch norms unfolded, as exporters do.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from examples.writer import Writer

FOLDER = Path(__file__).parent
EPOCHS, BATCH, WIDTH = 40, 64, 32


class Digits(nn.Module):
    """8x8 images with values 0..16 => ten scores; one residual block after the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.first, self.first_norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.second, self.second_norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.hidden, self.scores = nn.Linear(WIDTH * 16, 64), nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(image / 16)))
        y = torch.relu(self.first_norm(self.first(x)))
        x = torch.max_pool2d(torch.relu(x + self.second_norm(self.second(y))), 2)
        return self.scores(torch.relu(self.hidden(x.flatten(1))))


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, held-out images and labels: 1,347 and 450 of the 1,797, stratified."""
    digits = load_digits()
    images = digits.images[:, None].astype(np.float32)
    train, heldout, labels, answers = train_test_split(
        images, digits.target, test_size=450, stratify=digits.target, random_state=0
    )
    return train, labels, heldout, answers


def train(images: np.ndarray, labels: np.ndarray) -> Digits:
    """Adam with a falling step; images shifted by up to one pixel."""
    torch.manual_seed(0)
    model, x, y = Digits(), torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, EPOCHS * -(-len(x) // BATCH))
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            shift = tuple(torch.randint(-1, 2, (2,)).tolist())
            loss = nn.functional.cross_entropy(model(x[rows].roll(shift, (2, 3))), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def to_onnx(model: Digits) -> onnx.ModelProto:
    """The trained model as a graph with a symbolic batch."""
    writer = Writer()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    node = writer.node

    def weight(name: str) -> str:
        return writer.weight(name, weights[name])

    def convolution(x: str, name: str) -> str:
        y = node("Conv", x, weight(f"{name}.weight"), name=name, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        norm = [weight(f"{name}_norm.{part}") for part in ("weight", "bias", "running_mean", "running_var")]
        return node("BatchNormalization", y, *norm, name=f"{name}_norm", epsilon=1e-5)

    def linear(x: str, name: str) -> str:
        return node("Gemm", x, weight(f"{name}.weight"), weight(f"{name}.bias"), name=name, transB=1)

    x = node("Relu", convolution(node("Div", "image", writer.constant(16.0), name="scale"), "stem"))
    y = convolution(node("Relu", convolution(x, "first")), "second")
    x = node(
        "MaxPool", node("Relu", node("Add", x, y, name="residual")), name="pool", kernel_shape=[2, 2], strides=[2, 2]
    )
    scores = linear(node("Relu", linear(node("Flatten", x), "hidden")), "scores")
    return writer.model("digits", {"image": ("float32", ("N", 1, 8, 8))}, {"scores": (scores, "float32", ("N", 10))})


def main() -> None:
    images, labels, heldout, answers = data()
    model = train(images, labels)
    with torch.inference_mode():
        right = (model(torch.from_numpy(heldout)).argmax(1).numpy() == answers).mean()
    onnx.save(to_onnx(model), FOLDER / "digits.onnx")
    np.savez_compressed(FOLDER / "heldout.npz", images=heldout.astype(np.uint8), labels=answers.astype(np.uint8))
    print(f"held-out accuracy {right:.2%}, {(FOLDER / 'digits.onnx').stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
