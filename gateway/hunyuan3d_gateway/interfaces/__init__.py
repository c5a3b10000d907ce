"""The HTTP interfaces: thin adapters between a request of each kind and the one job model."""
