"""Our batcher against BentoML's, Ray Serve's and LitServe's: same model, load and transport."""
