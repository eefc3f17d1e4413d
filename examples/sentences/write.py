"""A model repository that turns sentences into vectors: tokenise (Python), MiniLM, pool (Python), and their ensemble.

    python -m examples.sentences.write build/sentences
    ingot serve build/sentences
"""

import shutil
import sys
from pathlib import Path

import onnx

from examples.minilm import encoder_model, minilm_config, package_folder

MODELS = Path(__file__).with_name("models")


def write_repository(root: Path, layers: int | None = None) -> Path:
    """The repository with the real weights and tokenizer; `layers`: only so many of the encoder's."""
    from safetensors.numpy import load_file

    shutil.copytree(MODELS, root, dirs_exist_ok=True)
    shutil.copy(package_folder() / "tokenizer.json", root / "tokenise" / "1")
    config = minilm_config()
    if layers is not None:
        config = type(config)(**{**vars(config), "num_hidden_layers": layers})
    (root / "encoder" / "1").mkdir(exist_ok=True)
    onnx.save(encoder_model(load_file(package_folder() / "model.safetensors"), config), root / "encoder/1/model.onnx")
    for name in ("pool", "sentences"):
        (root / name / "1").mkdir(exist_ok=True)
    return root


def main(arguments: list[str]) -> None:
    root = write_repository(Path(arguments[0] if arguments else "build/sentences"))
    print(f"{root}: {', '.join(sorted(path.name for path in root.iterdir()))}")


if __name__ == "__main__":
    main(sys.argv[1:])
