"""Values by key, and graphs."""
