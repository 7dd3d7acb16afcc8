"""The model file: its directory, the architecture rules, slices, and what they cost. Pure: bytes in."""
