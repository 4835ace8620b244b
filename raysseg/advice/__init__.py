"""Advice before money is spent: what a job takes, and which model to choose."""
