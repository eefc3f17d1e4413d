"""Foreign models become graphs."""
