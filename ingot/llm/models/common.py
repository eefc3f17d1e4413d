"""What the families share: sizes of config.json, the usual names of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ingot.errors import ImportFailure
from ingot.llm import rope
from ingot.llm.decoder import Activation, Array, Decoder, Experts, Layer, Matrix, Scale
from ingot.llm.quantized import matrices
from ingot.llm.weights import Checkpoint

USUAL_CONTEXT = 8192
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Extents that most families' config.json has under the same keys."""

    hidden: int
    layers: int
    heads: int
    groups: int
    depth: int
    inner: int
    vocabulary: int
    context: int

    @property
    def query(self) -> int:
        """Width of all queries."""
        return self.heads * self.depth

    @property
    def key(self) -> int:
        """Width of all keys, or values."""
        return self.groups * self.depth


def sizes_of(checkpoint: Checkpoint, context: int | None) -> Sizes:
    """The extents, checked against each other."""
    number = checkpoint.number
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    groups, longest = number("num_key_value_heads", heads), number("max_position_embeddings", USUAL_CONTEXT)
    depth = number("head_dim", max(hidden // heads, 1))
    if heads % groups or depth % 2:
        raise ImportFailure(f"{checkpoint.folder / 'config.json'}: {heads} heads of {depth} do not share {groups} keys")
    if context is not None and context > longest:
        raise ImportFailure(f"the model was made for {longest} tokens, a context of {context} is beyond that")
    return Sizes(hidden, checkpoint.layers("num_hidden_layers"), heads, groups, depth, number("intermediate_size"),
                 number("vocab_size"), context or min(longest, USUAL_CONTEXT))  # fmt: skip


def activation_of(checkpoint: Checkpoint, key: str = "hidden_act", default: str | None = "silu") -> Activation:
    """The activation that config.json names."""
    name = checkpoint.config.get(key) or default
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ImportFailure(f"{checkpoint.folder / 'config.json'}: {key} {name!r} is not known; "
                            f"known are {', '.join(ACTIVATIONS)}")  # fmt: skip
    return ACTIVATIONS[name]


def matrix(checkpoint: Checkpoint, width: int, *parts: tuple[str, int]) -> Matrix:
    """The parts (name, outputs) side by side, each with its bias where there is one."""
    quantized = matrices(checkpoint, width, parts)
    weights = () if quantized else tuple(checkpoint.take(f"{n}.weight", outputs, width) for n, outputs in parts)
    biases = tuple(b for name, outputs in parts if (b := checkpoint.take_if(f"{name}.bias", outputs)) is not None)
    if biases and len(biases) != len(parts):
        raise ImportFailure(f"{checkpoint.folder}: of {', '.join(name for name, _ in parts)} only some have a bias")
    return Matrix(weights, biases, quantized=quantized)


def scale(checkpoint: Checkpoint, name: str, width: int, offset: float = 0.0) -> Scale:
    """A norm's weight, and its bias where there is one."""
    return Scale(checkpoint.take(f"{name}.weight", width), checkpoint.take_if(f"{name}.bias", width), offset)


def attention(checkpoint: Checkpoint, sizes: Sizes, at: str) -> dict[str, Any]:
    """`projection` and `output` under the usual names."""
    parts = ((f"{at}.q_proj", sizes.query), (f"{at}.k_proj", sizes.key), (f"{at}.v_proj", sizes.key))
    return {
        "projection": matrix(checkpoint, sizes.hidden, *parts),
        "output": matrix(checkpoint, sizes.query, (f"{at}.o_proj", sizes.hidden)),
    }


def gated(checkpoint: Checkpoint, sizes: Sizes, at: str) -> dict[str, Any]:
    """`up`, `gate` and `down` under the usual names."""
    return {
        "up": matrix(checkpoint, sizes.hidden, (f"{at}.up_proj", sizes.inner)),
        "gate": matrix(checkpoint, sizes.hidden, (f"{at}.gate_proj", sizes.inner)),
        "down": matrix(checkpoint, sizes.inner, (f"{at}.down_proj", sizes.hidden)),
    }


def windows_of(checkpoint: Checkpoint, sizes: Sizes, slides: Callable[[int], bool]) -> list[int]:
    """Positions that each layer sees (0: all): as `layer_types` says, else where `slides(number)`."""
    window, kinds = checkpoint.count("sliding_window"), checkpoint.listed("layer_types")
    if kinds is not None and len(kinds) != sizes.layers:
        raise ImportFailure(f"{checkpoint.folder / 'config.json'}: {len(kinds)} layer_types for {sizes.layers} layers")
    unknown = next((kind for kind in kinds or () if kind not in ("sliding_attention", "full_attention")), None)
    if unknown is not None:
        raise ImportFailure(f"{checkpoint.folder / 'config.json'}: layer_types has {unknown!r}; known are "
                            "sliding_attention and full_attention")  # fmt: skip
    return [
        window if (kinds[number] == "sliding_attention" if kinds is not None else slides(number)) else 0
        for number in range(sizes.layers)
    ]


def usual_decoder(checkpoint: Checkpoint, context: int | None, layer: Callable[[Checkpoint, Sizes, int, int], Layer],
                  slides: Callable[[int], bool] = lambda number: True) -> Decoder:  # fmt: skip
    """The model of config.json's sizes, of layers `layer(checkpoint, sizes, number, window)`."""
    sizes = sizes_of(checkpoint, context)
    windows = windows_of(checkpoint, sizes, slides)
    return decoder_with(checkpoint, sizes, [layer(checkpoint, sizes, n, w) for n, w in enumerate(windows)])


def experts(checkpoint: Checkpoint, at: str, extents: tuple[int, int, int], names: tuple[str, str, str],
            normalised: bool) -> Experts:  # fmt: skip
    """`extents` are (how many, inner, hidden), `names` those of gate, up and down; `normalised`: the weights of the
    chosen add up to 1."""
    count, inner, hidden = extents

    def parts(name: str, *shape: int) -> tuple[Any, ...]:
        return tuple(checkpoint.take(f"{at}.experts.{e}.{name}.weight", *shape) for e in range(count))

    gate, up, down = names
    if checkpoint.number("num_experts_per_tok") > count:
        raise ImportFailure(f"{checkpoint.folder / 'config.json'}: 'num_experts_per_tok' is "
                            f"{checkpoint.number('num_experts_per_tok')}, and there are {count} experts")  # fmt: skip
    if checkpoint.has(f"{at}.experts.0.{gate}.qweight"):
        raise ImportFailure(f"{checkpoint.folder}: experts in integers ({at}.experts) are not read; take the "
                            "checkpoint that was not quantized")  # fmt: skip
    return Experts(
        checkpoint.take(f"{at}.gate.weight", count, hidden), parts(gate, inner, hidden), parts(up, inner, hidden),
        parts(down, hidden, inner), checkpoint.number("num_experts_per_tok"), normalised,
    )  # fmt: skip


def decoder_with(checkpoint: Checkpoint, sizes: Sizes, layers: Sequence[Layer], offset: float = 0.0,
                 **special: Any) -> Decoder:  # fmt: skip
    """A decoder with embedding, final norm and head under the usual names; `special` is what is not usual."""
    embedding = checkpoint.take("model.embed_tokens.weight", sizes.vocabulary, sizes.hidden)
    usual: dict[str, Any] = {
        "scale": sizes.depth**-0.5,
        "epsilon": checkpoint.real("rms_norm_eps", 1e-6),
        "activation": activation_of(checkpoint) if "activation" not in special else None,
    }
    if "rope" not in special:
        usual["rope"] = {"default": rope.tables(rope.settings_of(checkpoint.config), sizes.depth, sizes.context)}
    return Decoder(
        sizes.hidden, sizes.heads, sizes.groups, sizes.depth, sizes.context, embedding, layers,
        scale(checkpoint, "model.norm", sizes.hidden, offset), head_of(checkpoint, embedding), **{**usual, **special},
    )  # fmt: skip


def head_of(checkpoint: Checkpoint, embedding: Array) -> Matrix:
    """lm_head, or the embedding where they are tied."""
    if checkpoint.config.get("tie_word_embeddings") or not (
        checkpoint.has("lm_head.weight") or checkpoint.has("lm_head.qweight")
    ):
        checkpoint.take_if("lm_head.weight")
        return Matrix((embedding,))
    return matrix(checkpoint, embedding.shape[1], ("lm_head", embedding.shape[0]))
