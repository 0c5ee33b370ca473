"""Tests of everything. A package, so that they can share servers and fakes."""
