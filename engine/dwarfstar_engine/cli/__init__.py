"""The command line: reads settings once and assembles the parts."""
