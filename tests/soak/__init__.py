"""Proof that runs lose nothing: kills, failing files, fuzzed inputs and long runs."""
