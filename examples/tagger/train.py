"""Trains a small transformer that tags the words of order messages and writes tagger.onnx and heldout.npz.

    python -m examples.tagger.train          needs the extra train; twenty seconds

The graph has what the encoder of examples/minilm.py has not: norms before the branches, packed QKV, GELU with tanh, a
boolean mask made from the padding, and a symbolic batch and length.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from examples.tagger.sentences import PADDING, TAGS, batch, sentences, vocabulary
from examples.writer import Writer

FOLDER = Path(__file__).parent
WIDTH, HEADS, LAYERS, LONGEST = 64, 4, 2, 64
STEPS, BATCH = 1200, 64


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.packed, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x_NSC: torch.Tensor, mask_N11S: torch.Tensor) -> torch.Tensor:
        packed = self.packed(self.norm1(x_NSC)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in packed)
        context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask_N11S)
        x_NSC = x_NSC + self.project(context.transpose(1, 2).flatten(2))
        return x_NSC + self.narrow(nn.functional.gelu(self.wide(self.norm2(x_NSC)), approximate="tanh"))


class Tagger(nn.Module):
    """Word ids [N, S], 0 for padding => a score for every tag [N, S, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(max(vocabulary().values()) + 1, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.scores = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(TAGS))

    def forward(self, ids_NS: torch.Tensor) -> torch.Tensor:
        x_NSC = self.words(ids_NS) + self.places.weight[: ids_NS.shape[1]]
        for block in self.blocks:
            x_NSC = block(x_NSC, (ids_NS != PADDING)[:, None, None])
        return self.scores(self.norm(x_NSC))


def hide_words(ids_NS: torch.Tensor) -> torch.Tensor:
    """One word in eight becomes UNKNOWN, so that the model learns to read the context."""
    hidden = (torch.rand(ids_NS.shape) < 1 / 8) & (ids_NS != PADDING)
    return torch.where(hidden, 1, ids_NS)


def train() -> Tagger:
    torch.manual_seed(0)
    model = Tagger()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
    for step in range(STEPS):
        ids, tags = map(torch.from_numpy, batch(sentences(BATCH, seed=step, heldout=False)))
        loss = nn.functional.cross_entropy(model(hide_words(ids)).flatten(0, 1), tags.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class Graph:
    """The trained model's graph, written part by part."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.writer, self.weights = Writer(), weights
        self.node, self.constant = self.writer.node, self.writer.constant

    def weight(self, name: str) -> str:
        return self.writer.weight(name, self.weights[name])

    def linear(self, x: str, name: str) -> str:
        weight_KN = self.writer.weight(f"{name}.weight", self.weights[f"{name}.weight"].T)
        return self.node("Add", self.node("MatMul", x, weight_KN), self.weight(f"{name}.bias"), name=name)

    def norm(self, x: str, name: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.node("LayerNormalization", x, scale, bias, name=name, axis=-1, epsilon=1e-5)

    def gelu(self, x: str) -> str:
        """x (1 + tanh(sqrt(2/π) (x + 0.044715 x³))) / 2"""
        cube = self.node("Mul", self.node("Pow", x, self.constant(3.0)), self.constant(0.044715))
        inner = self.node("Mul", self.node("Add", x, cube), self.constant((2 / np.pi) ** 0.5))
        one_more = self.node("Add", self.node("Tanh", inner), self.constant(1.0))
        return self.node("Mul", self.node("Mul", x, self.constant(0.5)), one_more)

    def attention(self, x: str, mask: str, name: str) -> str:
        packed = self.linear(x, f"{name}.packed")
        split = self.node("Reshape", packed, self.constant([0, 0, 3, HEADS, WIDTH // HEADS], "int64"))
        moved = self.node("Transpose", split, perm=[2, 0, 3, 1, 4])
        query, key, value = (self.node("Gather", moved, self.constant(index, "int64"), axis=0) for index in range(3))
        scores = self.node("MatMul", query, self.node("Transpose", key, perm=[0, 1, 3, 2]))
        scaled = self.node("Mul", scores, self.constant((WIDTH // HEADS) ** -0.5))
        masked = self.node("Where", mask, scaled, self.constant(float(np.finfo(np.float32).min)))
        context = self.node("MatMul", self.node("Softmax", masked, axis=-1), value)
        merged = self.node("Transpose", context, perm=[0, 2, 1, 3])
        return self.linear(self.node("Reshape", merged, self.constant([0, 0, WIDTH], "int64")), f"{name}.project")

    def block(self, x: str, mask: str, name: str) -> str:
        x = self.node("Add", x, self.attention(self.norm(x, f"{name}.norm1"), mask, name))
        wide = self.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.wide"))
        return self.node("Add", x, self.linear(wide, f"{name}.narrow"))

    def embeddings(self) -> str:
        length = self.node("Slice", self.node("Shape", "ids"), self.constant([1], "int64"), self.constant([2], "int64"))
        zero = self.constant([0], "int64")
        places = self.node("Slice", self.weight("places.weight"), zero, length, zero, name="places")
        return self.node("Add", self.node("Gather", self.weight("words.weight"), "ids", name="words"), places)

    def model(self) -> onnx.ModelProto:
        present = self.node("Not", self.node("Equal", "ids", self.constant(PADDING, "int64")))
        mask, x = self.node("Unsqueeze", present, self.constant([1, 2], "int64"), name="mask"), self.embeddings()
        for index in range(LAYERS):
            x = self.block(x, mask, f"blocks.{index}")
        scores = self.linear(self.norm(x, "norm"), "scores")
        shape = ("N", "S", len(TAGS))
        return self.writer.model("tagger", {"ids": ("int64", ("N", "S"))}, {"tag_scores": (scores, "float32", shape)})


def main() -> None:
    model = train()
    ids, tags = batch(sentences(400, seed=1_000_000, heldout=True))
    with torch.inference_mode():
        right = (model(torch.from_numpy(ids)).argmax(-1).numpy() == tags)[tags >= 0].mean()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    onnx.save(Graph(weights).model(), FOLDER / "tagger.onnx")
    np.savez_compressed(FOLDER / "heldout.npz", ids=ids.astype(np.int16), tags=tags.astype(np.int8))
    print(f"held-out words tagged right {right:.2%}, {(FOLDER / 'tagger.onnx').stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
