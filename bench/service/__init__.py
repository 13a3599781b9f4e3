"""Measurements of the whole service, as `treeline serve` starts it."""
