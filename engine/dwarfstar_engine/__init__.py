"""DwarfStar's engine: one GGUF model, split by layers over node processes, served behind one endpoint.

Data flows one way: model file -> plan -> stage -> wire -> coordinator (``node``) -> API and front ends.
"""

import os

__version__ = "0.1.0"

# Read by gRPC when it is first imported, so set before any module of ours can do that.
# Its event engine reads and writes sockets on threads of its own, which costs each message thread hand-overs: without
# it one stream over two stages was 2 to 4 % faster in each of three alternating pairs. An owner's own choice stands.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener,-event_engine_callback_cq")
# We start programs, we do not go on in a forked copy: gRPC need not prepare for that, nor write about it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
