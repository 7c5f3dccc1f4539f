"""Compression without training: calibrated and least-squares steps, compensated rounding."""
