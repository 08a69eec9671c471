"""The operators: one module each, with its schema, fake, autograd Function and public functions."""
