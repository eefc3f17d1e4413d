"""One tritonclient gRPC call after the other, in an environment of its own: `PORT SECONDS`, a line of JSON back."""

import json
import sys
import time

import numpy as np
import tritonclient.grpc

client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}")
data = np.zeros((1, 1, 28, 28), np.float32)
tensor = tritonclient.grpc.InferInput("x", data.shape, "FP32")
tensor.set_data_from_numpy(data)
for _ in range(100):
    client.infer("model", [tensor])
latencies, used, end = [], time.process_time(), time.perf_counter() + float(sys.argv[2])
while (now := time.perf_counter()) < end:
    client.infer("model", [tensor])
    latencies.append(time.perf_counter() - now)
cpu = (time.process_time() - used) / len(latencies)
latencies.sort()
rate = len(latencies) / float(sys.argv[2])
figures = {"p50": latencies[len(latencies) // 2], "p99": latencies[len(latencies) * 99 // 100], "cpu": cpu}
print(json.dumps({"rate": rate, **{name: value * 1e6 for name, value in figures.items()}}))
