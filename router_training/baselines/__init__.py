"""Other ways to route, on the same prompts and adapters as the server's router."""
