"""The engine behind HTTP: OpenAI's and Anthropic's routes, batches, keys, metrics, a page."""
