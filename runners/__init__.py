"""One BentoML service per stage: models on windows, over the Open Inference Protocol."""
