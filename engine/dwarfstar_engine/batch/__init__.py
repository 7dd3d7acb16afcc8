"""Sequences, slots and the step scheduler. Pure: time and ids come as arguments."""
