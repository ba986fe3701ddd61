"""One architecture a file, each with its sizes and its PARTITION_RULES."""
