"""Chains: from a run to recorded draws."""
