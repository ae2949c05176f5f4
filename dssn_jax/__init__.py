"""DSSN: semi-supervised semantic segmentation in JAX and Flax."""
