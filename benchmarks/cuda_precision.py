"""Networks in int8 and fp8 beside fp16 on one GPU: times, and how far their results are from float32's.

    python -m benchmarks.cuda_peers ours --out DIR --only "resnet50 b128,resnet50 b128 int8,resnet50 b128 fp8,…"
    python -m benchmarks.cuda_precision DIR/ours.json

Every layer that can be narrow is. The second command writes benchmarks/results/h200-precision.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cuda_rows import ROWS, Row
from benchmarks.timing import RESULTS

_KEPT = ("SNR dB", "difference", "host steps", "build s")


def described(row: Row, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row beside its fp16 form; None when one of both was not measured."""
    mine, wide = found.get(row.name, {}), found.get(row.wide.name, {})
    if "graph ms" not in mine or "graph ms" not in wide:
        return None
    ms = mine["graph ms"]
    return {"row": row.wide.name, "form": row.form or "fp16", "ms": ms, "items a second": 1e3 * row.batch / ms,
            "x fp16": wide["graph ms"] / ms, **{key: mine.get(key) for key in _KEPT}}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="ours.json of benchmarks.cuda_peers")
    parser.add_argument("--name", default="h200-precision")
    arguments = parser.parse_args()
    run = json.loads(arguments.measured.read_text())
    narrow = {row.wide.name for row in ROWS if row.form}
    rows = [made for row in ROWS if row.wide.name in narrow and (made := described(row, run["rows"]))]
    claim = "networks with every layer narrow that can be, beside fp16, on one GPU"
    whole = {"claim": claim, "machines": run["machines"], "rows": rows}
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    for row in rows:
        noise = "not measured" if row["SNR dB"] is None else f"{row['SNR dB']:.1f} dB"
        print(f"{row['row']:16}{row['form']:6}{row['ms']:8.3f} ms{row['items a second']:10.0f} /s"
              f"{row['x fp16']:6.2f} x fp16   {noise}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
