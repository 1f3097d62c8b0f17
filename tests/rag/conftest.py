"""What all tests of RAG share."""

from support.private_temporary import _private_temporary  # noqa: F401 - pytest finds it here
