"""Vector stores: the contract, and an implementation for each engine."""
