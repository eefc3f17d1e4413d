"""GPU architectures that kernels are compiled for, and what is known of them without having one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ingot.errors import ConfigError
from ingot.kernels.target import Pace

_KIB = 1024
OVERLAPS_FROM = 90  # the capability from which launches may begin before those ahead of them have ended
EIGHTHS_FROM = 89  # the capability from which there are conversions and products of float8_e4m3fn


@dataclass(frozen=True)
class Architecture:
    """`capability` 90 for sm_90; `processors` and speeds of the usual chip of that kind: gigabytes a second, fp16
    TFLOP/s; `shared` bytes a block may have. Of the build: what float32 products may be rounded to (`precision`), and
    the libraries whose tactics are tried beside generated kernels."""

    name: str
    capability: int
    processors: int
    shared: int
    bandwidth: float
    tensor: float
    precision: str = "fp32"
    libraries: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The kernels' platform."""
        return "cuda"

    @property
    def lanes(self) -> int:
        """There is no blocked layout here."""
        return 1

    @property
    def hosts_two(self) -> bool:
        """Whether a processor has room for blocks of two launches that stream through shared memory, the second of
        which may begin before the first has ended."""
        return self.capability >= OVERLAPS_FROM and self.shared >= 200 * _KIB

    @property
    def machine(self) -> frozenset[str]:
        """What a device must be able to run."""
        return frozenset({self.name})

    @property
    def pace(self) -> Pace:
        """Of the whole GPU; a small step costs what a node of a graph costs, about a microsecond."""
        return Pace(1.5, self.bandwidth * 600, self.tensor * 4e5, 2.0, self.bandwidth * 600)

    @property
    def half_flops(self) -> float:
        """Tensor operations in 16 bits a microsecond."""
        return self.tensor * 1e6


BY_NAME = {
    a.name: a
    for a in (
        Architecture("sm_80", 80, 108, 163 * _KIB, 2000, 312),
        Architecture("sm_86", 86, 84, 99 * _KIB, 900, 150),
        Architecture("sm_89", 89, 128, 99 * _KIB, 1000, 330),
        Architecture("sm_90", 90, 132, 227 * _KIB, 4200, 750),
        Architecture("sm_100", 100, 148, 227 * _KIB, 7000, 1800),
        Architecture("sm_120", 120, 170, 99 * _KIB, 1700, 420),
    )
}


def architecture(name: str, precision: str = "fp32", libraries: Sequence[str] = ()) -> Architecture:
    """The architecture of a name; ConfigError for an unknown one."""
    if name not in BY_NAME:
        raise ConfigError(f"there is no GPU architecture {name!r}; choose from {', '.join(BY_NAME)}")
    return replace(BY_NAME[name], precision=precision, libraries=tuple(libraries))


def described(target: Architecture) -> str:
    """A name that `parse` reads: what a child process is told."""
    return f"{target.name} {target.precision} {','.join(target.libraries)}"


def parse(text: str) -> Architecture:
    """Of "sm_90 fp16 cublaslt"."""
    name, precision, libraries = text.split(" ")
    return architecture(name, precision, libraries.split(",") if libraries else ())
