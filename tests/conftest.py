"""What holds for every test."""

import os

# Tests that fork run in processes in which others have started gRPC: its handlers after a fork abort the child.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
