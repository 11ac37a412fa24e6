"""Measuring a bundle: labelled prompts in, plain figures out; nothing here draws or trains."""
