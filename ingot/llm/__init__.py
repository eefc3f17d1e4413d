"""Language models: a checkpoint becomes an engine; many requests share its steps."""
