"""What a method is: views, pseudo-labels and losses, as data and as functions."""
