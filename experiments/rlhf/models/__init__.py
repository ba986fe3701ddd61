"""Language models of the experiments: opened, sampled, exported."""
