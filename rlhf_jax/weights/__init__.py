"""Weight files: read, written and mapped to parameters. Knows no model."""
