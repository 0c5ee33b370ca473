"""Load on a running service, measured from outside: a client that imports nothing of ours."""
