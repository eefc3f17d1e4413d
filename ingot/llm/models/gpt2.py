"""GPT-2: LayerNorm, learned positions, biases everywhere, gelu; matrices are kept [in, out]."""

from __future__ import annotations

from ingot.errors import ImportFailure
from ingot.llm.decoder import Decoder, Layer, Matrix
from ingot.llm.models.common import activation_of, scale
from ingot.llm.quantized import matrices
from ingot.llm.weights import Checkpoint


def decoder(checkpoint: Checkpoint, context: int | None) -> Decoder:
    """The model of config.json's sizes; tensors may be named with or without the prefix `transformer.`."""
    number = checkpoint.number
    width, heads, longest = number("n_embd"), number("n_head"), number("n_positions")
    at = "transformer." if checkpoint.has("transformer.wte.weight") else ""
    if width % heads:
        raise ImportFailure(f"{checkpoint.folder / 'config.json'}: {heads} heads cannot share {width} columns")
    if context is not None and context > longest:
        raise ImportFailure(f"the model was made for {longest} tokens, a context of {context} is beyond that")
    embedding = checkpoint.take(f"{at}wte.weight", number("vocab_size"), width)
    checkpoint.take_if("lm_head.weight")
    inner, layers = number("n_inner", 4 * width), range(checkpoint.layers("n_layer"))
    return Decoder(
        width, heads, heads, width // heads, context or longest, embedding,
        [layer(checkpoint, f"{at}h.{n}", width, inner) for n in layers], scale(checkpoint, f"{at}ln_f", width),
        Matrix((embedding,)), (width // heads) ** -0.5, norm="layer",
        epsilon=checkpoint.real("layer_norm_epsilon", 1e-5),
        activation=activation_of(checkpoint, "activation_function", "gelu_new"),
        places=checkpoint.take(f"{at}wpe.weight", longest, width),
    )  # fmt: skip


def layer(checkpoint: Checkpoint, at: str, width: int, inner: int) -> Layer:
    """The layer whose names begin with `at`."""

    def product(name: str, wide: int, outputs: int) -> Matrix:
        bias = checkpoint.take(f"{at}.{name}.bias", outputs)
        quantized = matrices(checkpoint, wide, [(f"{at}.{name}", outputs)])
        weights = () if quantized else (checkpoint.take(f"{at}.{name}.weight", wide, outputs),)
        return Matrix(weights, (bias,), transposed=True, quantized=quantized)

    for buffer in ("bias", "masked_bias"):  # masks, that old files keep
        checkpoint.take_if(f"{at}.attn.{buffer}")
    return Layer(
        before_attention=scale(checkpoint, f"{at}.ln_1", width),
        projection=product("attn.c_attn", width, 3 * width),
        output=product("attn.c_proj", width, width),
        before_network=scale(checkpoint, f"{at}.ln_2", width),
        up=product("mlp.c_fc", width, inner),
        down=product("mlp.c_proj", inner, width),
    )
