"""What every trained model shares: mesh, sharding, optimiser, loop, checkpoints, metrics. Knows neither images nor
text."""
