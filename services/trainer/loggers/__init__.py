"""Where metrics go beside `metrics.jsonl`, which is always written: TensorBoard and Weights & Biases, both optional."""
