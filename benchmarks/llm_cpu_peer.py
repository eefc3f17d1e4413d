"""llama.cpp on a GGUF file, told what to do line by line, so that it takes turns with Ingot.

    PEER/bin/python benchmarks/llm_cpu_peer.py model.gguf THREADS [plain]

plain: without weights packed again for this processor, AMX's tiles among them.
Each line of standard input is JSON: {"prefill": tokens}, or {"decode": tokens}, to continue with one by one. The answer
is a line of JSON: seconds, and for a prefill the last token's logits. Needs llama-cpp-python alone.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp
import numpy as np


class Peer:
    """A model and a context; what was prefilled last is what decoding continues."""

    def __init__(self, path: str, threads: int, packed: bool) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.use_extra_bufts = packed
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot read {path}")
        given = llama_cpp.llama_context_default_params()
        given.n_ctx, given.n_batch, given.n_ubatch = 1024, 512, 512
        given.n_threads = given.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, given)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def prefill(self, tokens: list[int]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self._decode(tokens)

    def decode(self, tokens: list[int]) -> None:
        for token in tokens:
            self._decode([token])

    def _decode(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status:
            raise SystemExit(f"llama_decode returned {status}")
        llama_cpp.llama_synchronize(self.context)

    def logits(self) -> list[float]:
        """Of the last token."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, -1)
        return [round(float(x), 5) for x in np.ctypeslib.as_array(pointer, (self.vocabulary,))]


def main() -> None:
    peer = Peer(sys.argv[1], int(sys.argv[2]), "plain" not in sys.argv[3:])
    version = {"llama-cpp-python": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}
    print(json.dumps(version), flush=True)
    for line in sys.stdin:
        ((work, tokens),) = json.loads(line).items()
        start = time.perf_counter()
        getattr(peer, work)(tokens)
        answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer | ({"logits": peer.logits()} if work == "prefill" else {})), flush=True)


if __name__ == "__main__":
    main()
