"""Who is in the cluster, who leads it, and what all of it remembers, as pure state machines.

``membership`` runs in a coordinator, ``leadership`` in every node; both take events and the time and give effects,
which one driver carries out in order. ``state`` is the small state that every node keeps; ``events`` tells what
happened and why.
"""
