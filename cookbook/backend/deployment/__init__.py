"""A deployment: the process that serves completions of a model, and its HTTP interface."""
