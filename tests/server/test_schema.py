"""The compiled schema is what the .proto files say, and what a client sends."""

from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

from ingot.server.schema import DESCRIPTORS, as_plain, message, methods


def test_the_descriptors_are_compiled_from_the_files_beside_them(tmp_path: Path) -> None:
    folder, compiled = DESCRIPTORS.parent, tmp_path / "descriptors.binpb"
    names = [path.name for path in sorted(folder.glob("*.proto"))]
    assert protoc.main(["", f"-I{folder}", "--include_imports", f"--descriptor_set_out={compiled}", *names]) == 0
    fresh, kept = (
        {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file}
        for path in (compiled, DESCRIPTORS)
    )
    assert fresh == kept and sorted(kept) == names


def test_messages_as_plain_data() -> None:
    config = message("inference.ModelConfig")(name="m", max_batch_size=4)
    config.input.add(name="x", data_type="TYPE_FP32", dims=[1, -1])
    config.dynamic_batching.priority_queue_policy[2].max_queue_size = 5
    plain = as_plain(config)
    assert plain["input"][0]["data_type"] == "TYPE_FP32" and plain["input"][0]["dims"] == [1, -1]
    assert plain["dynamic_batching"]["priority_queue_policy"]["2"]["max_queue_size"] == 5
    assert "sequence_batching" not in plain and plain["parameters"] == {}


def test_every_method_has_messages() -> None:
    for name, method in methods("inference.GRPCInferenceService").items():
        assert message(method.input_type.full_name) and message(method.output_type.full_name), name
