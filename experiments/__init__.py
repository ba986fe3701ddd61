"""The runner: the only place that knows meshes, files, flags, clocks and processes. One command each, `python -m`."""
