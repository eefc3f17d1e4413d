"""The flat plan below the graph: `plan.py` (data), `extent.py` (sizes), `lower.py`, `memory.py`."""
