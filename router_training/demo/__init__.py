"""The embedded demo: a synthetic task world, a base, adapters and a router, all from seeds."""
