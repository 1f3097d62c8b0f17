"""Services ready to be registered; each is imported from the module that is named after it, with its own extra."""
