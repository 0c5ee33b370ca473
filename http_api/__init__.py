"""The HTTP face of the composer: routes, negotiation, limits, problems. `service.py` mounts it."""
