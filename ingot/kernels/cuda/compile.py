"""Triton text → cubin, in a child process; neither a GPU nor torch is needed. Known cubins are taken from a cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import linecache
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ingot.errors import BuildError
from ingot.kernels.cuda.architecture import BY_NAME, EIGHTHS_FROM, OVERLAPS_FROM
from ingot.kernels.cuda.build import NAME, NATIVE, OVERLAP, Unit

_ALIGNED = [["tt.divisibility", 16]]
_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel: `shared` bytes of dynamic shared memory, `threads` a block; registers a thread and bytes
    spilled are ptxas' words."""

    code: bytes
    shared: int
    threads: int
    registers: int
    spilled: int


_TOGETHER = 80  # registers of a thread whose block shares its processor with one of attention


@cache
def fingerprint() -> str:
    """What besides a unit decides its cubin: Triton, the functions it may call, the registers it may have."""
    sha = hashlib.sha256(f"{version('triton')} {_TOGETHER}".encode())
    for path in sorted((Path(__file__).parent / "cores").glob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


def overlaps(unit: Unit, capability: int) -> bool:
    """Whether the kernel waits itself for the launch before (programmatic dependent launch)."""
    return unit.overlaps and capability >= OVERLAPS_FROM


def beside(unit: Unit, capability: int) -> bool:
    """Whether it is meant to be there together with the launch behind."""
    return overlaps(unit, capability) and unit.beside


def compile_unit(unit: Unit, name: str) -> Cubin:
    """The unit as a cubin for the architecture of that name. BuildError with Triton's words when it does not compile,
    or asks for more shared memory than the architecture has."""
    target = BY_NAME[name]
    place = _cache_folder() / f"{unit.symbol(target)}-{fingerprint()}.json"
    known = _read(place)
    made = known if known is not None else assembled(unit, target.capability)[0]
    if known is None:
        _write(place, made)
    if made.shared > target.shared:
        raise BuildError(f"a kernel needs {made.shared} bytes of shared memory, {name} has {target.shared}")
    return made


def assembled(unit: Unit, capability: int) -> tuple[Cubin, str]:
    """The unit compiled anew, and its PTX. BuildError as of `compile_unit`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    text = unit.text.replace(NATIVE, "") if capability >= EIGHTHS_FROM else unit.text
    function = load(replace(unit, text=text.replace(OVERLAP, "") if overlaps(unit, capability) else text))
    names = [name for name, _ in unit.signature]
    aligned = [i for i, (name, kind) in enumerate(unit.signature) if kind[0] == "*" or name in unit.aligned]
    source = (GluonASTSource if unit.gluon else ASTSource)(fn=function, signature=dict(unit.signature), constexprs={},
                       attrs={(i,): _ALIGNED for i in aligned})  # fmt: skip
    options = {"num_warps": unit.warps, "num_stages": unit.stages}
    if unit.together:
        options["maxnreg"] = _TOGETHER
    words = io.StringIO()
    with _quiet_triton(), contextlib.redirect_stdout(words):
        try:
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        except Exception as error:  # whatever Triton raises, the candidate is lost and named
            raise BuildError(f"Triton cannot compile {names}: {' '.join(str(error).split())[-600:]}") from error
    return _cubin(made, words.getvalue()), made.asm["ptx"]


def _cubin(made: Any, words: str) -> Cubin:
    facts = made.metadata
    if facts.global_scratch_size or facts.profile_scratch_size or facts.name != NAME:
        raise BuildError("the kernel needs scratch memory of Triton's own, which nothing gives it; a bug in Ingot")
    used, spilled = _USED.search(words), _SPILLED.search(words)
    return Cubin(made.asm["cubin"], facts.shared, 32 * facts.num_warps, int(used[1]) if used else 0,
                 int(spilled[1]) if spilled else 0)  # fmt: skip


def load(unit: Unit) -> Any:
    """The unit's Triton function; its text is kept where Triton looks for sources."""
    name = f"<ingot {hashlib.sha256(unit.text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(unit.text), None, unit.text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"__name__": "ingot.generated"}
    exec(compile(unit.text, name, "exec"), scope)
    return scope[NAME]


@contextlib.contextmanager
def _quiet_triton() -> Iterator[None]:
    """Triton without source lines in the cubin (the same text gives the same bytes) and with a cache of its own."""
    from triton import knobs

    knobs.compilation.disable_line_info = True
    knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory(prefix="ingot-triton-") as folder:
        knobs.cache.dir = folder
        yield


def _cache_folder() -> Path:
    root = os.environ.get("INGOT_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ingot" / "cubins"


def _read(place: Path) -> Cubin | None:
    try:
        known = json.loads(place.read_text())
        return Cubin(bytes.fromhex(known.pop("code")), **known)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(place: Path, made: Cubin) -> None:
    """Best effort: a cache that cannot be written costs time, nothing else."""
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**asdict(made), "code": made.code.hex()}))
        os.replace(temporary, place)
    except OSError:
        temporary.unlink(missing_ok=True)
