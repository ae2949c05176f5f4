"""Random-access sources of images."""
