"""Token vectors to one vector a sentence: the mean of those that are no padding, scaled to length 1."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Pools every request for itself."""

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        hidden_NSC = pb_utils.get_input_tensor_by_name(request, "hidden").as_numpy()
        mask_NS1 = pb_utils.get_input_tensor_by_name(request, "mask").as_numpy()[..., None].astype(np.float32)
        mean_NC = (hidden_NSC * mask_NS1).sum(1) / np.maximum(mask_NS1.sum(1), 1e-9)
        vectors_NC = mean_NC / np.maximum(np.linalg.norm(mean_NC, axis=1, keepdims=True), 1e-12)
        return pb_utils.InferenceResponse([pb_utils.Tensor("embedding", vectors_NC.astype(np.float32))])
