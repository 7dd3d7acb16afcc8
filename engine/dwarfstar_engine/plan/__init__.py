"""Who gets which layers, and why. Pure."""
