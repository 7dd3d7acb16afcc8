"""The node daemon and the coordinator role."""
