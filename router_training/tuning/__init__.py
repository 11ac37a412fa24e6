"""Train one adapter, or several at once, on the base as it is served: data, methods, proof."""
