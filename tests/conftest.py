"""What holds for every test."""

import os
import signal

from hypothesis import HealthCheck, settings

# Tests that fork run in processes in which others have started gRPC: its handlers after a fork abort the child.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# What is begun in the background of a shell ignores Ctrl-C, and hands that on to what it begins.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long a drawn case takes says how busy the machine is, not whether it is right.
settings.register_profile("ingot", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ingot")
