"""Training and fine-tuning: data, objectives, the loop, adapters, and writing what came out as a checkpoint."""
