"""Sentences to token numbers, with the tokenizer.json beside this file."""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

COLUMNS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
STEP = 16  # rows are padded to a multiple of this, so that sentences of similar length share a batch of the encoder


class TritonPythonModel:
    """Tokenises every request for itself."""

    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.tokenizer = Tokenizer.from_file(os.path.join(pb_utils.get_model_dir(), "tokenizer.json"))
        self.tokenizer.enable_truncation(int(parameters["longest"]["string_value"]))
        self.tokenizer.enable_padding(pad_to_multiple_of=STEP)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        texts = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().ravel()
        try:
            rows = self.tokenizer.encode_batch([text.decode() for text in texts])
        except UnicodeDecodeError as error:
            problem = pb_utils.TritonError(f"a text is not UTF-8: {error}", pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=problem)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(name, np.array([getattr(row, column) for row in rows], np.int64))
                for name, column in COLUMNS.items()
            ]
        )
