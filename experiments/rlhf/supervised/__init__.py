"""Fine-tuning, DPO and reward models: training on given texts."""
