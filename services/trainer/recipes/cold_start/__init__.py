"""`opd cold-start`: teacher rollouts, filters, fine-tuning, and the prompts that are left for distillation (5.1)."""
