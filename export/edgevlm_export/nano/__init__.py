"""nano, the built-in model: its whole recipe, from PyPI wheels to the files that are shipped."""
