"""The terminal app. Not there yet: `dwarfstar` prints the status until it is."""
