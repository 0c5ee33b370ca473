"""The calls of `remix.composer` and `jobs` over gRPC."""
