"""Retrieval-augmented generation: from files to answers that name their passages."""
