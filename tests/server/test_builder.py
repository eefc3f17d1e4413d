"""Engines of a repository: built once per content, copied before they are mapped, built again if damaged."""

import os
from pathlib import Path

import pytest

from ingot.engine import Engine
from ingot.server.builder import Builder
from ingot.server.config import ModelConfig
from ingot.server.request import ServerError
from tests.server.models import add_version, scale

ARGUMENTS = ("--level", "0", "--no-verify")


def test_an_onnx_file_is_built_once_and_again_if_it_changes(tmp_path: Path) -> None:
    builder, cache = Builder(tmp_path / "cache", ARGUMENTS), tmp_path / "cache"
    folder = add_version(tmp_path, "m", 1, scale(2.0)) / "1"
    builder.engine(ModelConfig(name="m"), folder)
    (built,) = cache.iterdir()
    before = built.stat().st_mtime_ns
    builder.engine(ModelConfig(name="m"), folder)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [before]
    add_version(tmp_path, "m", 1, scale(3.0))
    builder.engine(ModelConfig(name="m"), folder)
    assert len(list(cache.iterdir())) == 2
    built.write_bytes(b"damaged")
    add_version(tmp_path, "m", 1, scale(2.0))
    assert builder.engine(ModelConfig(name="m"), folder).inputs[0].name == "x"
    assert built.stat().st_size > 100 and len(list(cache.iterdir())) == 2


def test_an_engine_that_is_overwritten_in_place_does_not_change_what_serves(tmp_path: Path) -> None:
    builder = Builder(tmp_path / "cache", ARGUMENTS)
    folder = add_version(tmp_path, "m", 1, scale(2.0)) / "1"
    engine = builder.engine(ModelConfig(name="m"), folder)
    engine.save(folder / "model.engine")
    os.remove(folder / "model.onnx")
    served = builder.engine(ModelConfig(name="m"), folder)
    (folder / "model.engine").write_bytes(b"x" * 100)
    assert Engine.load(served.source).verified().inputs[0].name == "x"
    with pytest.raises(ServerError, match="model 'm'"):
        builder.engine(ModelConfig(name="m"), folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"backend": "pytorch"}, "no backend 'pytorch'"),
        ({"platform": "tensorrt_plan"}, "holds none of model.plan, model.engine"),
        ({"default_model_filename": "../1/model.onnx"}, "leads out of the version's folder"),
        ({"default_model_filename": "other.onnx"}, "holds none of other.onnx"),
    ],
)
def test_what_cannot_be_found(tmp_path: Path, config: dict[str, str], message: str) -> None:
    folder = add_version(tmp_path, "m", 1, scale(2.0)) / "1"
    with pytest.raises(ServerError, match=message):
        Builder(tmp_path / "cache", ARGUMENTS).engine(ModelConfig(name="m", **config), folder)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    folder = add_version(tmp_path, "m", 1, scale(2.0)) / "1"
    (folder / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ServerError, match=r"model\.onnx cannot be built"):
        Builder(tmp_path / "cache", ARGUMENTS).engine(ModelConfig(name="m"), folder)
    assert not list((tmp_path / "cache").glob("*"))
