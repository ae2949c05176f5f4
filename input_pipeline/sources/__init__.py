"""Random-access sources of images and labels."""
