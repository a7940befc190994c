"""Figures: charts of numbers, pictures of slices and masks, and the viewer."""
