"""Measuring DwarfStar beside real peers: processes, load, scenarios, report. ``cli/bench.py`` is its command line."""
