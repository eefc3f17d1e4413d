"""MLServer's runtime over onnxruntime, one thread: runs in the peers' environment (benchmarks/server_hosts.py)."""

from typing import Any

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    """The model file that model-settings.json names."""

    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
        self.session: Any = onnxruntime.InferenceSession(
            self.settings.parameters.uri, options, providers=["CPUExecutionProvider"]
        )
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feeds = {item.name: NumpyCodec.decode_input(item) for item in payload.inputs}
        names = [output.name for output in self.session.get_outputs()]
        results = self.session.run(names, feeds)
        outputs = [NumpyCodec.encode_output(name, data) for name, data in zip(names, results, strict=True)]
        return InferenceResponse(model_name=self.name, outputs=outputs)
