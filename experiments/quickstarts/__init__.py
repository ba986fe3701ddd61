"""The quickstarts, one a file: commands in a row, from nothing to a report, as `run(config, workdir)`."""
