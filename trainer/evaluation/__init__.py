"""Evaluation of drawn images: features, and the figures that the paper reports."""
