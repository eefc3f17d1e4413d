"""The model server: `ingot serve models/`. docs/server.md names each file and follows one request through them."""
