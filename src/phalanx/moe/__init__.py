"""Mixture of experts: which rank has which expert, and how tokens get there and back."""
