"""Screens of the app, one a file. They see views and states only, and ask the session through their host."""
