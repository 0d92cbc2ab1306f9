"""Reading language models: components, scores and tokens."""
