"""Measurements that stand behind what the project says of its speed, size and fairness."""
