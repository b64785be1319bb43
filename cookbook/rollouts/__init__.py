"""Sampling the policy: prompt groups with their completions, and the account of the rows that they came from."""
