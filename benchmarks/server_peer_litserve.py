"""LitServe over onnxruntime, one thread: runs in the peers' environment (benchmarks/server_hosts.py).

server_peer_litserve.py MODEL PORT        POST /predict {"input": numbers, "shape": extents}
"""

import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime


class OnnxApi(litserve.LitAPI):
    """One request an execution, as JSON."""

    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
        self.session: Any = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def decode_request(self, request: dict[str, Any]) -> Any:
        return np.array(request["input"], np.float32).reshape(request["shape"])

    def predict(self, x: Any) -> Any:
        return self.session.run(None, {self.input: x})[0]

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"output": output.ravel().tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(OnnxApi(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="error")
