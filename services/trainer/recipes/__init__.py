"""Ways to begin: what is done before a distillation run, or around one."""
