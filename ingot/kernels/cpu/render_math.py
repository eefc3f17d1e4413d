"""Renderers of transcendental functions."""
