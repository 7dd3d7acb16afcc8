"""No test here says how long anything takes, so none may fail for it on a machine that others use, too."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
