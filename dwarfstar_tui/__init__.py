"""The terminal app: a client of a running engine, never in its loop.

Data flows one way. A thread of its own (:mod:`.session`) asks the engine and listens to it; what it learns waits in a
:mod:`.mailbox`; the :mod:`.app` takes it at its pace, reduces it to a state (:mod:`.store`, pure) and shows that to one
screen. Screens turn the state into lines of runs (:mod:`.cluster_rows`, :mod:`.plan_lines`, :mod:`.event_lines`: pure)
and draw those that changed. What a person asks for goes the other way, as commands.

Only :mod:`.session` and :mod:`.client` know how the engine is reached.
"""
