"""AllReduce and AllGather: what ranks that compute one model together know of each other's results.

Every rank runs the same graph with its own weights. The numpy meanings take the others' values from the group that
`ingot.runtime.group.member` names.
"""

from __future__ import annotations

from typing import Literal

from ingot.errors import GraphError
from ingot.ir.elementwise import Array
from ingot.ir.ops_table import Attribute, TensorType, op
from ingot.runtime.group import Group, current

Operation = Literal["all_reduce", "all_gather"]
COLLECTIVE: dict[str, Operation] = {"AllReduce": "all_reduce", "AllGather": "all_gather"}  # operator -> method of Group


def _same_type(x: TensorType, *, ranks: int) -> TensorType:
    return x


def _of_all(x: TensorType, *, ranks: int) -> TensorType:
    return TensorType(x.dtype, (ranks, *x.shape))


@op("AllReduce", "x", _same_type, ranks=Attribute("int"))
def all_reduce(x: Array, *, ranks: int) -> Array:
    """The sum over the group's ranks, in their order"""
    return x if ranks == 1 else _group(ranks).all_reduce(x)


@op("AllGather", "x", _of_all, ranks=Attribute("int"))
def all_gather(x: Array, *, ranks: int) -> Array:
    """Every rank's x, along a new first axis"""
    return x[None] if ranks == 1 else _group(ranks).all_gather(x)


def _group(ranks: int) -> Group:
    group = current()
    if group is None or group.ranks != ranks:
        raise GraphError(f"the graph is for a group of {ranks} ranks, there is "
                         f"{'none' if group is None else f'one of {group.ranks}'}")  # fmt: skip
    return group
