"""float64 NumPy versions of what krul computes; nothing here imports krul."""
