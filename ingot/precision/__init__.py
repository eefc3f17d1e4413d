"""Precisions: a model rewritten to compute in another type."""
