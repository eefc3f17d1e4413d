"""The metrics page: every name that dashboards of Triton ask for, in a form that Prometheus reads."""

import ctypes
import http.client
import json
import re
from collections import defaultdict
from typing import Any

import pytest

from ingot.server import gpus
from ingot.server.app import Server
from tests.server.test_app import INFER

SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\.)*",?)*)\})? (\S+)')
TRITONS = (
    "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count",
    "nv_inference_pending_request_count", "nv_inference_request_duration_us", "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us", "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us", "nv_cache_num_hits_per_model", "nv_cache_num_misses_per_model",
    "nv_cache_hit_duration_per_model", "nv_cache_miss_duration_per_model", "nv_cpu_utilization",
    "nv_cpu_memory_total_bytes", "nv_cpu_memory_used_bytes", "nv_gpu_utilization", "nv_gpu_memory_total_bytes",
    "nv_gpu_memory_used_bytes", "nv_gpu_power_usage", "nv_gpu_power_limit", "nv_energy_consumption",
)  # fmt: skip


def page(server: Server) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["metrics"], timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def parsed(text: str) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """(kinds, values by labels) by name, read as Prometheus' text format says."""
    kinds: dict[str, str] = {}
    values: dict[str, dict[str, float]] = defaultdict(dict)
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in kinds, f"{name} is declared twice"
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            family = re.sub(r"_(bucket|sum|count)$", "", match[1])
            assert match[1] in kinds or kinds.get(family) == "histogram", f"{match[1]} has no type"
            assert match[2] not in values[match[1]], f"{line} comes twice"
            values[match[1]][match[2] or ""] = float(match[3])
    return kinds, values


def infer(server: Server, path: str = "scale") -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60)
    connection.request("POST", f"/v2/models/{path}/infer", json.dumps(INFER))
    connection.getresponse().read()
    connection.close()


def test_names_and_kinds(server: Server) -> None:
    kinds, values = parsed(page(server))
    assert [name for name in TRITONS if name not in kinds] == []
    assert all(name.startswith(("nv_", "ingot_")) for name in kinds)
    assert all(value >= 0 for samples in values.values() for value in samples.values())
    assert values["ingot_model_versions"]['state="READY"'] > 5


def test_counters_count(server: Server) -> None:
    mine = 'model="scale",version="3"'
    before = parsed(page(server))[1]
    for _ in range(3):
        infer(server)
    infer(server, "scale/versions/3")
    after = parsed(page(server))[1]

    def grown(name: str, labels: str = mine) -> float:
        return after[name][labels] - before[name].get(labels, 0)

    assert grown("nv_inference_request_success") == grown("nv_inference_count") == 4
    assert grown("nv_inference_exec_count") == grown("ingot_executions_by_rows_total", f'{mine},rows="1"') == 4
    assert grown("ingot_request_latency_seconds_count") == 4 and grown("ingot_request_latency_seconds_sum") > 0
    assert grown("ingot_request_latency_seconds_bucket", f'{mine},le="+Inf"') == 4
    assert grown("nv_inference_compute_infer_duration_us") < grown("nv_inference_request_duration_us")


def test_histograms_only_grow(server: Server) -> None:
    values = parsed(page(server))[1]["ingot_request_latency_seconds_bucket"]
    by_model: dict[str, list[float]] = defaultdict(list)
    for labels, value in values.items():
        by_model[labels.partition(",le=")[0]].append(value)
    assert all(counts == sorted(counts) and len(counts) == 15 for counts in by_model.values())


# -- GPUs -------------------------------------------------------------------------------------------------------------
class Driver:
    """NVML as it answers for one GPU that does not tell its power limit."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {"nvmlDeviceGetPowerUsage": 70_500, "nvmlDeviceGetTotalEnergyConsumption": 5_000}

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:
        found = memory._obj
        found.total, found.used = 100, 25
        return 0

    def nvmlDeviceGetUtilizationRates(self, device: Any, rates: Any) -> int:
        rates._obj.gpu = 50
        return 0

    def __getattr__(self, name: str) -> Any:
        def read(device: Any, value: Any) -> int:
            if name not in self.fields:
                return 3  # NVML_ERROR_NOT_SUPPORTED
            value._obj.value = self.fields[name]
            return 0

        return read


def test_gpus(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "devices", lambda: (Driver(), (("GPU-1", None),)))
    kinds, values = parsed(page(server))
    found = {name: values[name].get('gpu_uuid="GPU-1"') for name in kinds if name.startswith(("nv_gpu", "nv_energy"))}
    assert found == {
        "nv_gpu_utilization": 0.5, "nv_gpu_memory_total_bytes": 100, "nv_gpu_memory_used_bytes": 25,
        "nv_gpu_power_usage": 70.5, "nv_gpu_power_limit": None, "nv_energy_consumption": 5,
    }  # fmt: skip


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(f"no {name}")

    gpus.devices.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert [list(gpus.samples(gauge)) for gauge in gpus.GAUGES] == [[]] * len(gpus.GAUGES)
    gpus.devices.cache_clear()
