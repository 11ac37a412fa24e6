"""Train the adapters and the router that mora-serve runs."""
