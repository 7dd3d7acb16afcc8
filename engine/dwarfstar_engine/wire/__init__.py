"""What crosses between processes: protos, frames, certificates, ring streams."""

import os

# Read by gRPC when it is first imported. Its event engine reads and writes sockets on threads of its own, which costs
# each message two thread hand-overs (measured: 0.1 ms of the 0.75 ms a token spends in a ring of two stages). Without
# it the thread that waits for events does the reading. An owner's own choice stands.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
# We start programs, we do not go on in a forked copy: gRPC need not prepare for that, nor write about it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
