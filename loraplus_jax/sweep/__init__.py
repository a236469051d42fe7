"""Sweeps: which method and which lambda help on the user's task, at equal budgets."""
