"""Models are made and installed here.

This file imports nothing, and must stay so: `install`, `read_arrays` and `fill_weights` run in the
serving environment, which has no torch. The modules named after a stage need torch.
"""
