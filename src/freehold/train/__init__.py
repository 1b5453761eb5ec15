"""Training: data, tokenizer, corpus, objective, trainer, fine-tuning, publishing."""
