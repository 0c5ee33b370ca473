"""The Python client and the `philharmonics` command: the public HTTP API, and nothing else."""
