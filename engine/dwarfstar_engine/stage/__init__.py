"""The stage process: the only place where llama.cpp runs."""
