"""Reads the data that lies beside the shared models: images, crops, a recording. Needs Pillow."""

import gzip
import tarfile
import wave
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406], "f4"), np.array([0.229, 0.224, 0.225], "f4")


def idx(path: Path) -> np.ndarray:
    """An array in MNIST's IDX format, compressed: big-endian magic (type, rank), extents, bytes."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    extents = np.frombuffer(raw, ">i4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(extents)


def mnist(assets: Path) -> tuple[np.ndarray, np.ndarray]:
    """10,000 images [N, 1, 28, 28] with values 0..255, as the model wants them, and their labels."""
    folder = assets / "vision" / "mnist"
    images, labels = (idx(folder / f"t10k-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    return images[:, None].astype(np.float32), labels


def cifar(assets: Path) -> tuple[np.ndarray, np.ndarray]:
    """3,000 test images [N, 3, 32, 32], normalised, and their labels, in the archive's order."""
    images, labels = [], []
    with tarfile.open(assets / "vision" / "cifar10" / "cifar10_test_jpeg_3000.tar") as archive:
        for member in archive:
            if (file := archive.extractfile(member)) is not None and member.name.endswith(".jpg"):
                pixels = np.asarray(Image.open(BytesIO(file.read())).convert("RGB"), np.float32) / 255
                images.append(((pixels - MEAN) / DEVIATION).transpose(2, 0, 1))
                labels.append(CIFAR_CLASSES.index(member.name.split("/")[-2]))
    return np.stack(images), np.array(labels)


def crops(assets: Path, extent: int, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """`count` seeded square crops of the three photographs, uint8 [1, extent, extent, 3]."""
    source = np.random.default_rng(seed)
    folder = assets / "vision" / "mobilenet"
    photographs = [Image.open(folder / name).convert("RGB") for name in ("cat.bmp", "grace_hopper.bmp", "parrot.jpg")]
    for _ in range(count):
        photograph = photographs[source.integers(len(photographs))]
        side = int(source.integers(128, min(photograph.size) + 1))
        left, top = (int(source.integers(0, length - side + 1)) for length in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side)).resize((extent, extent), Image.Resampling.BILINEAR)
        yield np.asarray(crop)[None]


def luminance(assets: Path, extents: tuple[int, int]) -> np.ndarray:
    """The super-resolution picture's luminance in 0..1, cut to the extents: [1, 1, H, W]."""
    picture = Image.open(assets / "vision" / "superres" / "test_superresolution.png").convert("YCbCr")
    height, width = extents
    return np.asarray(picture, np.float32)[None, None, :height, :width, 0] / 255


def recording(assets: Path) -> np.ndarray:
    """The speech recording: 16 kHz, one channel, in -1..1."""
    with wave.open(str(assets / "audio" / "silero_vad" / "test.wav")) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (16000, 1, 2):
            raise ValueError("test.wav is not 16 kHz, 16 bit, mono")
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
