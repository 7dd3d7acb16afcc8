"""Widgets of the app, one a file, each with its .tcss beside it where it has one. They see views and states only."""
