"""Grey release: versions side by side, traffic moved on evidence, rolled back by itself (docs/release.md)."""
