"""Parts that several services use."""
